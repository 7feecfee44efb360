"""Group norms get the affines with which they stand in for trained batch norms, and nothing else changes."""

import copy
import functools
import logging
import os

import pytest
import timm
import torch
import torchvision
from calibrated_networks import (
    NORMS,
    TwoNorms,
    assert_equal,
    both,
    converted,
    has_hooks,
    images,
    network,
    trained,
    with_statistics,
)
from detectron2.layers import CycleBatchNormList
from needs import COMPILE
from torch import nn
from torch.nn import functional as F

from gng_d2 import GroupNorm, calibrate_norms, convert_norms, norm_table

# trained on ImageNet, under torchvision's names: beside the checkout, where there is one
WEIGHTS = os.environ.get("MOBILENET_V2_WEIGHTS", "../shared/data/weights/mobilenet_v2_imagenet.pth")


def moments(x):
    x = x.double()
    return x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)


def brute_force(model, reference, inputs):
    """The affine of each group norm, one after another, from whole runs of the parts before it."""
    result = []
    model, reference = copy.deepcopy(model).double().eval(), copy.deepcopy(reference).double().eval()
    for i, norm in enumerate(model):
        if isinstance(norm, nn.GroupNorm):
            normalized = F.group_norm(model[:i](inputs.double()), norm.num_groups, eps=norm.eps)
            (mean, std), (wanted_mean, wanted_std) = moments(normalized), moments(reference[: i + 1](inputs.double()))
            weight = wanted_std / std * reference[i].weight.sign()
            with torch.no_grad():
                norm.weight.copy_(weight), norm.bias.copy_(wanted_mean - weight * mean)
            result += [norm.weight, norm.bias]
    return result


def affines(model):
    return [p for norm in model.modules() if isinstance(norm, nn.GroupNorm) for p in (norm.weight, norm.bias)]


def assert_close(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def joined(network, batches):
    """Outputs of images of several sizes as one."""
    return torch.cat([network(x).flatten(2) for x in batches], 2)[..., None]


def distance(ours, theirs):
    """Of outputs, in deviations of theirs."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return (ours - theirs).norm() / (theirs - theirs.mean((0, 2, 3), keepdim=True)).norm()


@pytest.mark.parametrize("norm", ["GN1", "GN/2", "PGN"])
def test_each_affine_is_that_of_a_loop_over_the_norms(norm):
    reference, inputs = trained(), images()
    model = converted(reference, norm)
    assert calibrate_norms(model, reference, inputs) is model
    assert_close(affines(model), brute_force(model, reference, inputs))
    for i in NORMS:
        assert_close(moments(model[: i + 1](inputs)), moments(reference[: i + 1](inputs)))


def test_several_batches_count_as_one():
    reference, inputs = trained(), images()
    one, several, twice = (converted(reference, "GN/4") for _ in range(3))
    calibrate_norms(one, reference, inputs)
    calibrate_norms(several, reference, inputs.split(1))
    assert_close(affines(one), affines(several), 1e-5)
    calibrate_norms(twice, reference, (batch for batch in inputs.split([1, 5, 2])))
    assert_close(affines(one), affines(twice), 1e-5)
    calibrate_norms(twice, reference, inputs)  # norms after a norm saw what it puts out, so once is enough
    assert_close(affines(one), affines(twice), 1e-5)


def test_images_of_several_sizes_count_by_their_positions():
    reference, sizes = trained(), [images(1, size) for size in (9, 12, 17)]
    model = converted(reference)
    calibrate_norms(model, reference, sizes)
    for i in NORMS:
        assert_close(moments(joined(model[: i + 1], sizes)), moments(joined(reference[: i + 1], sizes)))


class Keeps(nn.Module):
    """Keeps a tensor in a module from one layer to a later one, and after that: as an attribute, or as timm's hooks."""

    def __init__(self, hooked):
        super().__init__()
        self.first, self.second = network()[:2], nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        self.hooked = hooked
        if hooked:
            self.kept = {}
            self.first[0].register_forward_hook(functools.partial(self.keep, "first"))

    def keep(self, name, layer, args, output):
        self.kept[name] = output

    def forward(self, x):
        x = self.first(x)
        if not self.hooked:
            self.kept = {"first": x}
        return self.last(torch.cat([self.second(x), self.kept["first"]], 1))


@pytest.mark.parametrize("hooked", [False, True])
def test_several_batches_count_as_one_where_modules_keep_tensors(hooked):
    reference, inputs = with_statistics(Keeps(hooked)), images()
    reference.eval()(inputs[:1])  # what it keeps has a graph
    with torch.no_grad():
        one, several = (Keeps(hooked) for _ in range(2))
        for model in (one, several):
            convert_norms(model, "GN1", inputs)
            model.load_state_dict(reference.state_dict(), strict=False)
            model.kept = reference.kept
    calibrate_norms(one, reference, inputs)
    calibrate_norms(several, reference, inputs.split([1, 5, 2]))
    assert_close(affines(one), affines(several), 1e-5)


def test_an_empty_batch_changes_nothing(caplog):
    reference, x = trained(), images()
    model, other = (converted(reference) for _ in range(2))
    calibrate_norms(model, reference, [x, x[:0]])
    calibrate_norms(other, reference, x)
    assert_equal(model.state_dict(), other.state_dict())
    caplog.clear()
    calibrate_norms(model, reference, x[:0])
    assert "0 norms are calibrated; 3 were not reached by inputs (1, 4, 7)" in caplog.text


def test_moments_are_sums_of_64_bits():
    """In 32 bits, numbers of 1e6 and their squares leave little room for a deviation of 1."""
    reference, inputs = nn.Sequential(nn.BatchNorm2d(3, eps=0)), torch.randn(8, 3, 12, 12) + 1e6
    model = nn.Sequential(GroupNorm(1, 3))
    calibrate_norms(model, reference, inputs)
    assert_close(affines(model), brute_force(model, reference, inputs), 5e-4)


def test_the_error_is_the_distance_of_the_outputs_in_deviations(caplog):
    reference, inputs = trained(), images()
    model = converted(reference, "GN/2")
    calibrate_norms(model, reference, inputs.split(4))
    for i in NORMS:
        expected = distance(model[: i + 1](inputs), reference[: i + 1](inputs))
        assert model[i].calibration_error == pytest.approx(expected, rel=1e-4)
    rows = norm_table(model)
    assert [row.calibration_error for row in rows] == [model[i].calibration_error for i in NORMS]
    assert "calibration_error" in str(rows) and "calibration_error" not in str(norm_table(reference))


def test_both_networks_are_else_what_they_were():
    class Draws(nn.Module):
        def forward(self, x):
            return x + torch.rand(1)

    reference = trained().append(Draws()).train()
    model = converted(reference)
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    modes = [m.training for m in model.modules()]
    inputs = images(4)
    before = copy.deepcopy(model.state_dict())
    of_reference = copy.deepcopy([reference.state_dict(), torch.get_rng_state()])
    calibrate_norms(model, reference, inputs)
    assert_equal([reference.state_dict(), torch.get_rng_state()], of_reference)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (int(name.split(".")[0]) in NORMS)
    assert [m.training for m in model.modules()] == modes and reference.training
    assert not model[1].weight.requires_grad and model[4].weight.requires_grad
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert not has_hooks(model, reference)


@pytest.mark.parametrize("context", [torch.autocast("cpu", torch.bfloat16), torch.inference_mode()])
def test_autocast_and_inference_mode_change_nothing(context):
    reference, inputs = trained(), images()
    plain, other = (converted(reference) for _ in range(2))
    calibrate_norms(plain, reference, inputs)
    with context:
        calibrate_norms(other, reference, inputs)
    assert_equal(affines(other), affines(plain))
    other(inputs).sum().backward()


@COMPILE
def test_a_compiled_network_is_what_it_compiles():
    reference, inputs = trained(), images()
    plain, compiled = (converted(reference) for _ in range(2))
    calibrate_norms(plain, reference, inputs)
    calibrate_norms(torch.compile(compiled, backend="eager"), reference, inputs)
    assert_equal(affines(compiled), affines(plain))


def test_a_half_model_is_calibrated_from_its_own_numbers():
    reference, inputs = trained(), images()
    model = converted(reference).bfloat16()
    calibrate_norms(model, copy.deepcopy(reference).bfloat16(), inputs.bfloat16())
    assert model[1].weight.dtype == torch.bfloat16
    assert_close(affines(model)[:2], brute_force(converted(reference), reference, inputs)[:2], 5e-2)


def test_passes_share_few_threads(monkeypatch, set_threads):
    """Each thread that computes has threads of its own, which it keeps."""
    reference, seen = trained(), []
    model = converted(reference)
    monkeypatch.setattr("gng_d2.models.passes.MOST_THREADS", 48)
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    set_threads(4)
    calibrate_norms(model, reference, images().split(1))
    assert seen == [3] * 8 and torch.get_num_threads() == 4


# channels


def test_a_channel_without_signal_takes_weight_0_and_the_mean(caplog):
    reference, inputs = trained(), images(1, 24)
    with torch.no_grad():
        reference[0].weight[[2, 5]] *= 1e-6
        reference[0].bias[[2, 5]] = 0.1
        reference[1].running_mean[2], reference[1].running_var[2] = 0.1, 1e-12
        reference[1].eps = 1e-14
        reference[1].weight[5] = 0
    model = converted(reference)
    model[1].eps = 1e-5
    calibrate_norms(model, reference, inputs)
    assert model[1].weight[2] == 0 and model[1].weight[5] == 0 and (model[1].weight == 0).sum() == 2
    torch.testing.assert_close(model[1].bias[2], reference[:2](inputs)[:, 2].mean(), rtol=1e-3, atol=1e-3)
    assert model[1].bias[5].item() == pytest.approx(reference[1].bias[5].item(), abs=1e-5)
    assert "1 have channels without signal, whose weight is 0 (1 (1))" in caplog.text


@pytest.mark.parametrize("dtype, dead", [(torch.float32, [3]), (torch.bfloat16, [2, 3])])
def test_signal_is_a_thousandth_of_the_groups_deviation_or_what_the_type_resolves(dtype, dead):
    reference = nn.Sequential(nn.BatchNorm2d(4)).to(dtype)
    model = nn.Sequential(GroupNorm(1, 4)).to(dtype)
    half = torch.randn(8, 4, 12, 6) * 2**0.5 * torch.tensor([1, 1, 2e-3, 5e-4])[:, None, None]
    calibrate_norms(model, reference, torch.cat([half, -half], 3).to(dtype))  # the mean of each group is 0
    assert (model[0].weight == 0).nonzero().flatten().tolist() == dead


def test_a_weight_is_at_most_ten_times_the_largest():
    reference, inputs = trained(), images()
    with torch.no_grad():
        reference[0].weight[2] *= 0.01
        reference[0].bias.zero_()
        reference[1].running_mean.zero_()
        reference[1].running_var[2] *= 1e-4
        reference[1].eps = 1e-9
    model = converted(reference)
    calibrate_norms(model, reference, inputs)
    assert model[1].weight.abs().max().item() == pytest.approx(10 * reference[1].weight.abs().max().item())
    assert model[1].weight.abs().argmax() == 2


def test_a_norm_that_saw_too_few_numbers_is_left_and_named(caplog):
    reference = trained()
    model = converted(reference)
    calibrate_norms(model, reference, images(1, 6))  # 2 x 2 positions after the second convolution
    assert model[1].weight.unique().numel() == 8
    assert (model[4].weight == 1).all() and (model[7].bias == 0).all()
    assert "2 saw fewer than 16 numbers in a channel (4, 7)" in caplog.text


# norms and networks of other kinds


def test_norms_without_counterpart_or_affine_keep_what_they_have(caplog):
    reference, inputs = trained(), images()
    reference[7] = nn.Identity()
    model = copy.deepcopy(reference)
    model[1], model[4], model[7] = GroupNorm(1, 8), GroupNorm(1, 12, affine=False), nn.GroupNorm(2, 4)
    calibrate_norms(model, reference, inputs)
    assert (model[1].weight != 1).all() and (model[7].weight == 1).all()
    assert model[7].calibration_error is None and model[4].calibration_error > 0
    assert "1 have no counterpart in the reference (7)" in caplog.text
    assert "1 have no weight and bias of their own (4)" in caplog.text


class Doubles(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("without", ["bias", "own weight"])
def test_a_norm_whose_affine_cannot_be_written_is_left_and_its_error_is_right(without, caplog):
    reference, inputs = trained(), images()
    model = converted(reference)
    with torch.no_grad():
        model[4].weight.copy_(reference[4].weight)
    if without == "bias":
        model[4].bias = None
    else:
        nn.utils.parametrize.register_parametrization(model[4], "weight", Doubles())
    before = copy.deepcopy(model[4].state_dict())
    calibrate_norms(model, reference, inputs)
    assert_equal(model[4].state_dict(), before)
    assert "1 have no weight and bias of their own (4)" in caplog.text
    expected = distance(model[:5](inputs), reference[:5](inputs))
    assert model[4].calibration_error == pytest.approx(expected, rel=1e-3)
    assert (model[7].weight != 1).all()


class Shared(nn.Module):
    """A head on several levels, as RetinaNet's."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm_a, self.norm_b, self.norm_c = norm(8), norm(8), norm(8)

    def one(self, x):
        return self.norm_c(self.c(F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))))

    def forward(self, x):
        return [self.one(level) for level in (x, 2 * x + 1)]


def test_standardized_convolutions_are_named_wherever_they_are_registered(caplog):
    inputs = images()
    convert_norms(Shared(nn.BatchNorm2d), "GN1+WS", inputs, calibrate=inputs)
    said = "3 follow a standardized convolution, after which little of the reference is left (norm_a, norm_b, norm_c)"
    assert said in caplog.text
    caplog.clear()
    model = convert_norms(Shared(nn.BatchNorm2d), "GN1+WS", inputs)
    calibrate_norms(converted(model, "GN/2+WS", inputs), model, inputs)
    assert "is left" not in caplog.text


def outputs_of(network, names, inputs):
    """Those of the modules with these names, of all calls, when ``network`` runs in eval mode."""
    seen = {name: [] for name in names}
    for name in names:
        module = network.get_submodule(name)
        # an activation after it may be in place
        module.register_forward_hook(lambda _, args, output, name=name: seen[name].append(output.detach().clone()))
    network.eval()(inputs)
    return {name: torch.cat(outputs) for name, outputs in seen.items()}


def test_a_norm_that_is_called_several_times_takes_the_moments_of_all_calls():
    (reference, model), inputs, names = both(Shared), images(), ("norm_a", "norm_b", "norm_c")
    calibrate_norms(model, with_statistics(reference), inputs.split(4))
    ours, theirs = (outputs_of(network, names, inputs) for network in (model, reference))
    for name in names:
        assert_close(moments(ours[name]), moments(theirs[name]), 1e-3)


@pytest.mark.parametrize("batches", [1, 4])
def test_norms_that_detectron2_uses_in_turn_are_one(batches):
    """RetinaNet's head has a CycleBatchNormList, a norm for each level, where it has one group norm."""

    class Head(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), norm

        def forward(self, x):
            return [self.norm(self.conv(level)) for level in (x, 2 * x + 1)]

    reference, model = with_statistics(Head(CycleBatchNormList(2, num_features=8))), Head(GroupNorm(2, 8))
    nn.init.normal_(reference.norm.weight), nn.init.normal_(reference.norm.bias)
    model.load_state_dict(reference.state_dict(), strict=False)
    inputs = images()
    calibrate_norms(model, reference, inputs.chunk(batches))
    ours, theirs = (torch.cat(network.eval()(inputs)) for network in (model, reference))
    assert_close(moments(ours), moments(theirs), 1e-3)


def test_batches_may_take_different_paths():
    class Skips(TwoNorms):
        def forward(self, x):
            x = self.conv(x)
            return self.last(self.norm(x) if x.shape[2] > 10 else x)

    reference, model = both(Skips)
    batches = [images(2, 8), images(2, 12), images(2, 9)]
    calibrate_norms(model, reference, batches)
    assert_close(moments(joined(model.eval(), batches)), moments(joined(reference.eval(), batches)), 1e-3)


def test_timms_norms_are_matched_before_their_activation():
    reference, inputs = timm.create_model("efficientnet_b0", num_classes=4), torch.randn(4, 3, 64, 64)
    model = converted(reference, "GN1", inputs)
    calibrate_norms(model, reference, inputs)
    outputs = []
    for each in (model, reference):
        each.bn1.drop.register_forward_pre_hook(lambda _, args: outputs.append(args[0].detach().clone()))
        each.eval()(inputs)
    assert (outputs[0] < -1).any()  # SiLU gives no less than -0.3
    assert_close(*map(moments, outputs), 1e-3)


def test_detectron2s_inputs_are_a_batch():
    class Model(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), norm(8)

        def forward(self, inputs):
            return self.norm(self.conv(torch.stack([one["image"] for one in inputs])))

    reference, model = both(Model)
    calibrate_norms(model, reference, [{"image": image} for image in images(4)])
    assert (model.norm.weight != 1).all()


def test_a_hook_that_both_networks_have_is_not_counted_twice():
    """It acts on the batch norm's output in the reference, and on the group norm's after the calibration."""
    reference, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).eval(), images()
    reference[1].running_var.fill_(0.3)
    reference[1].register_forward_hook(lambda module, args, output: 2 * output)
    model = converted(reference, "GN1", x, calibrate=x)
    assert_close(*([m(x).std((0, 2, 3))] for m in (model, reference)), 1e-3)


# conversion and calibration in one


def test_convert_norms_calibrates_against_what_the_model_was(caplog):
    reference, inputs = trained(), images()
    model = copy.deepcopy(reference)
    parameters = list(model.parameters())
    assert convert_norms(model, "PGN", inputs, calibrate=inputs.split(2)) is model
    assert caplog.text.count("3 norms are PGN now") == 1
    wanted = calibrate_norms(converted(reference, "PGN", inputs), reference, inputs)
    assert_close(affines(model), affines(wanted))
    assert [a is b for a, b in zip(model.parameters(), parameters)] == [True] * len(parameters)
    assert model[7].calibration_error == pytest.approx(wanted[7].calibration_error)
    again = copy.deepcopy(model)
    convert_norms(again, "PGN", inputs, calibrate=inputs)
    assert [row.calibration_error for row in norm_table(again)] == [row.calibration_error for row in norm_table(model)]


def test_a_model_without_batch_norms_is_left(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with caplog.at_level(logging.INFO):
        convert_norms(model, "GN1", calibrate=images())
    assert "0 norms are GN1 now" in caplog.text and "calibrate_norms" not in caplog.text
    assert "nothing is calibrated, because no norm was converted" in caplog.text


# real networks


def agreement(model, reference, inputs):
    """How often the class with the highest score is the same."""
    return (model.eval()(inputs).argmax(1) == reference.eval()(inputs).argmax(1)).float().mean().item()


@pytest.mark.slow
def test_a_network_trained_here_survives():
    side = torch.linspace(-1, 1, 12)

    def batch(number):
        """A bright stripe on noise, in one of four directions."""
        labels = torch.randint(4, (number,))
        angles = labels * torch.pi / 4
        place = side * angles.cos()[:, None, None] + side[:, None] * angles.sin()[:, None, None]
        stripe = (4 * place + 6 * torch.rand(number, 1, 1)).sin()
        return stripe[:, None] * torch.tensor([1, 0.5, 2])[:, None, None] + torch.randn(number, 3, 12, 12) / 2, labels

    reference = nn.Sequential(network(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    reference(batch(2)[0])
    optimizer = torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9)
    for _ in range(150):
        inputs, labels = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(reference(inputs), labels).backward()
        optimizer.step()
    inputs, labels = batch(512)
    assert (reference.eval()(inputs).argmax(1) == labels).float().mean() > 0.9
    fresh = converted(reference)
    calibrated = converted(reference, calibrate=batch(64)[0])
    assert agreement(calibrated, reference, inputs) > 0.85 > agreement(fresh, reference, inputs) + 0.1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(WEIGHTS), reason=f"{WEIGHTS} is not there")
def test_mobilenet_with_imagenet_weights_survives():
    reference = torchvision.models.mobilenet_v2()
    reference.load_state_dict(torch.load(WEIGHTS, weights_only=True), strict=False)
    reference.eval()
    inputs = F.interpolate(torch.randn(16, 3, 12, 12), size=96, mode="bicubic")
    model = converted(reference, "GN1", inputs[:1], calibrate=inputs.split(4))
    names = [name for name, module in reference.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(names) == 52
    ours, theirs = (outputs_of(network, names, inputs) for network in (model, reference))
    count = 0
    for name in names:
        weight, largest = model.get_submodule(name).weight.abs(), reference.get_submodule(name).weight.abs().max()
        alive = (weight > 0) & (weight < 9.99 * largest)
        count += int(alive.sum())
        assert_close(moments(ours[name][:, alive]), moments(theirs[name][:, alive]), 1e-2)
    assert count > 0.9 * sum(reference.get_submodule(name).num_features for name in names)
    fresh = converted(reference, "GN1", inputs[:1]).eval()
    lost = fresh.features[18][1](fresh.features[18][0](fresh.features[:18](inputs)))
    last = theirs["features.18.1"]
    assert distance(ours["features.18.1"], last) < 0.5 * distance(lost, last)
