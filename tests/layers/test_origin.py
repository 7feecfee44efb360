"""Which layer's output a tensor is: training and a run without gradients see the same, on meta too."""

import copy
import logging
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from needs import LOOK
from torch import nn
from torch.nn import functional as F

from gng_d2 import PracticalGroupNorm, bind_norms
from gng_d2.errors import InputError
from gng_d2.layers.kinds import NO_LAYER
from gng_d2.layers.look import made_by
from gng_d2.layers.origin import op_kind
from gng_d2.layers.producers import find_producers

pytestmark = LOOK

C, SIZE = 8, 6


class Net(nn.Module):
    """``run`` is its forward; its layer is ``conv``, which has 64 inputs, and its norm is registered after that."""

    def __init__(self, run, children=(), parameters=()):
        super().__init__()
        self.run = run
        self.conv, self.norm = nn.Conv2d(64, C, 1), PracticalGroupNorm(C)
        for name, child in dict(children).items():
            setattr(self, name, copy.deepcopy(child))
        for name, shape in dict(parameters).items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("mask", torch.rand(SIZE, SIZE).round())

    def forward(self, x):
        return self.norm(self.run(self, x))


def conv(n_in, n_out=C, size=1):
    return nn.Conv2d(n_in, n_out, size, padding=size // 2)


def vector(x):
    return x.mean((2, 3))


def film(net, x):
    scale, shift = net.to_both(vector(x))[:, :, None, None].chunk(2, 1)
    return net.conv(x) * (1 + scale) + shift


def tokens(net, x):
    """Linear layers, and low-rank adapters beside them."""
    x = x.flatten(2).transpose(1, 2)
    return (net.linear(x) + 2 * net.up(net.down(F.dropout(x, 0.1, net.training)))).transpose(1, 2)


def in_place(net, x):
    h = net.conv(x)
    h += net.gain
    h *= 2
    return h


def viewed_before_it_changed(net, x):
    h = net.stem(x)
    tokens = h.flatten(2)
    h.relu_()
    return net.conv(h) + net.up(net.down(tokens.view(h.shape)))


LORA = {"down": conv(64, 2), "up": conv(2)}
SEVERAL = {"other": conv(64)}

# what the layer's output meets: (forward up to the norm, children, parameters)
STAYS = {
    "a gain": (lambda net, x: net.conv(x) * net.gain, {}, {"gain": (C, 1, 1)}),
    "a gain and a shift, in place": (in_place, {}, {"gain": (C, 1, 1)}),
    "a learned position": (lambda net, x: net.conv(x) + net.position, {}, {"position": (1, C, SIZE, SIZE)}),
    "an upsampled position": (
        lambda net, x: net.conv(x) + F.interpolate(net.position, size=SIZE, mode="bilinear"),
        {},
        {"position": (1, C, 2, 2)},
    ),
    "numbers": (lambda net, x: 3 - (1 + net.conv(x)) / 2, {}, {}),
    "noise": (lambda net, x: torch.randn_like(h := net.conv(x)) + h, {}, {}),
    "dropout": (lambda net, x: F.dropout2d(net.conv(x)), {}, {}),
    "the model's input": (lambda net, x: net.conv(x) + x[:, :C], {}, {}),
    "a mask": (lambda net, x: torch.where(net.mask > 0, net.conv(x), 0.0), {}, {}),
    "a mask token": (lambda net, x: torch.where(net.mask > 0, net.conv(x), net.token), {}, {"token": (C, 1, 1)}),
    "filling": (lambda net, x: net.conv(x).masked_fill(net.mask > 0, -1.0), {}, {}),
    "another of its values": (lambda net, x: torch.where((h := net.conv(x)) > 0, h, h.flip(0) * 0.1), {}, {}),
    "mixup": (lambda net, x: 0.7 * (h := net.conv(x)) + 0.3 * h[[1, 0]], {}, {}),
    "its mean": (lambda net, x: (h := net.conv(x)) - h.mean((2, 3), keepdim=True), {}, {}),
    "its mean over channels": (lambda net, x: (h := net.conv(x)) - h.mean(1, keepdim=True), {}, {}),
    "its own gate": (lambda net, x: (h := net.conv(x)) * h.sigmoid(), {}, {}),
    "interpolation": (lambda net, x: torch.lerp(h := net.conv(x), h.roll(1, 2), 0.3), {}, {}),
    "a time embedding": (
        lambda net, x: net.conv(x) + net.time(vector(x).sin())[:, :, None, None],
        {"time": nn.Linear(64, C)},
        {},
    ),
    "an expanded embedding": (
        lambda net, x: torch.add(h := net.conv(x), net.time(vector(x))[..., None, None].expand_as(h)),
        {"time": nn.Linear(64, C)},
        {},
    ),
    "FiLM": (film, {"to_both": nn.Linear(64, 2 * C)}, {}),
    "squeeze-excite": (
        lambda net, x: (h := net.conv(x)) * net.fc2(F.relu(net.fc1(h.mean((2, 3), keepdim=True)))).sigmoid(),
        {"fc1": conv(C, 2), "fc2": conv(2)},
        {},
    ),
    "an old squeeze-excite": (
        lambda net, x: (h := net.conv(x)) * net.fc(vector(h)).sigmoid().view(2, C, 1, 1).expand_as(h),
        {"fc": nn.Linear(C, C)},
        {},
    ),
    "a gate of positions": (
        lambda net, x: net.conv(x) * net.gate(x.amax(1, keepdim=True)).sigmoid(),
        {"gate": conv(1, 1, 3)},
        {},
    ),
    "LoRA": (lambda net, x: net.conv(x) + net.up(net.down(x)) * 2, LORA, {}),
    "LoRA, then an embedding": (
        lambda net, x: net.conv(x) + net.up(net.down(x)) + net.time(vector(x))[..., None, None],
        {**LORA, "time": nn.Linear(64, C)},
        {},
    ),
    "two LoRAs": (
        lambda net, x: net.up(net.down(x)) + net.conv(x) + net.up2(net.down2(x)),
        {**LORA, "down2": conv(64, 4), "up2": conv(4)},
        {},
    ),
    "LoRA of tokens": (
        tokens,
        {"linear": nn.Linear(64, C), "down": nn.Linear(64, 2, False), "up": nn.Linear(2, C, False)},
        {},
    ),
    "LoRA on a view made before its tensor changed": (viewed_before_it_changed, {**LORA, "stem": conv(64, 64)}, {}),
    "a copy into an empty tensor": (lambda net, x: torch.empty_like(h := net.conv(x)).copy_(h), {}, {}),
    "a copy over the output of another layer": (
        lambda net, x: net.small(x[:, :4]).copy_(net.conv(x)),
        {"small": conv(4)},
        {},
    ),
    "LoRA merged": (
        lambda net, x: F.linear(x.flatten(2).mT, net.weight + net.up @ net.down).mT,
        {},
        {"weight": (C, 64), "up": (C, 2), "down": (2, 64)},
    ),
    "RepVGG": (lambda net, x: (net.norm1(net.other(x)), net.conv(x))[1], {**SEVERAL, "norm1": nn.BatchNorm2d(C)}, {}),
    "BasicBlock": (
        lambda net, x: net.conv(F.relu(net.norm1(net.other(x)) + x)),
        {"other": conv(64, 64), "norm1": nn.BatchNorm2d(64)},
        {},
    ),
    "LoRA merged, behind a position": (
        lambda net, x: F.linear((x[:1] + net.position).flatten(2)[0].T, net.weight + net.up @ net.down).T[None],
        {},
        {"weight": (C, 64), "up": (C, 2), "down": (2, 64), "position": (1, 64, SIZE, SIZE)},
    ),
    "rows of an attention over parameters": (lambda net, x: net.weight @ x.flatten(2), {}, {"weight": (C, 64)}),
    "an einsum": (lambda net, x: torch.einsum("oi,bihw->bohw", net.weight, x), {}, {"weight": (C, 64)}),
    "windows": (lambda net, x: net.conv(x).view(2, C, 3, 2, SIZE).transpose(2, 3).flip(2).flatten(2), {}, {}),
    "rows of a map that is as wide as it has channels": (
        lambda net, x: net.conv(F.pad(x, (1, 1, 1, 1)))[:, :, 1:-1],
        {},
        {},
    ),
    "tokens without the first": (
        lambda net, x: net.linear(x.flatten(2).mT)[:, 1:].transpose(1, 2),
        {"linear": nn.Linear(64, C)},
        {},
    ),
}
NO_SINGLE = {
    "residual sum": (lambda net, x: net.conv(x) + net.other(x), SEVERAL, {}),
    "product of two": (lambda net, x: net.conv(x) * net.other(x).sigmoid(), SEVERAL, {}),
    "choice of two": (lambda net, x: torch.where(net.mask > 0, net.conv(x), net.other(x)), SEVERAL, {}),
    "identity shortcut": (lambda net, x: net.conv(x := F.relu(net.stem(x))) + x[:, :C], {"stem": conv(64, 64)}, {}),
    "projection shortcut": (
        lambda net, x: net.norm1(net.conv(x)) + net.other(x),
        {**SEVERAL, "norm1": nn.BatchNorm2d(C)},
        {},
    ),
    "pre-activation": (
        lambda net, x: (h := net.other(x)) + net.conv(net.wide(F.relu(h))),
        {**SEVERAL, "wide": conv(C, 64)},
        {},
    ),
    "densenet": (lambda net, x: torch.cat([net.narrow(x), net.conv(x)[:, :4]], 1), {"narrow": conv(64, 4)}, {}),
    "FPN": (
        lambda net, x: net.conv(x) + F.interpolate(net.other(F.max_pool2d(x, 2)), scale_factor=2.0),
        SEVERAL,
        {},
    ),
    "ControlNet": (
        lambda net, x: net.conv(x) + net.zero(F.silu(net.control(x.flip(0)))),
        {"control": conv(64, 64), "zero": conv(64)},
        {},
    ),
    "an adapter with an activation": (lambda net, x: net.conv(x) + net.up(F.relu(net.down(x))), LORA, {}),
    "an adapter that is no bottleneck": (
        lambda net, x: net.conv(x) + net.up(net.down(x)),
        {"down": conv(64, 8), "up": conv(8)},
        {},
    ),
    "an adapter on another tensor": (
        lambda net, x: net.conv(net.stem(x)) + net.up(net.down(net.stem2(x))),
        {**LORA, "stem": conv(64, 64), "stem2": conv(64, 64)},
        {},
    ),
    "attention over values": (
        lambda net, x: ((v := net.conv(x).flatten(2).mT) @ v.mT).softmax(-1).matmul(v).mT,
        {},
        {},
    ),
    "a graph": (
        lambda net, x: (net.graph(x.flatten(2).mT) @ net.conv(x).flatten(2).mT).mT,
        {"graph": nn.Linear(64, 36)},
        {},
    ),
    "activation": (lambda net, x: F.silu(net.conv(x)), {}, {}),
    "one through an inverse": (lambda net, x: 1 / net.conv(x), {}, {}),
    "half of its channels": (lambda net, x: net.wide(x)[:, :C], {"wide": conv(64, 2 * C)}, {}),
}


def net(name):
    run, children, parameters = {**STAYS, **NO_SINGLE}[name]
    return Net(run, children, parameters)


def picture():
    return torch.randn(2, 64, SIZE, SIZE)


def expected(name):
    return (8, 64) if name in STAYS else (1, C)


@pytest.mark.parametrize("name", [*STAYS, *NO_SINGLE])
@pytest.mark.parametrize("input_has_gradients", [False, True])
def test_what_training_sees(name, input_has_gradients):
    model, seen = net(name), []
    model.norm.register_forward_pre_hook(lambda norm, args: seen.append(made_by(args[0])))
    if name in STAYS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(picture().requires_grad_(input_has_gradients))
        assert seen[0].is_layer and seen[0].n_in == 64
    else:
        with pytest.raises(InputError, match=r"was bound to Conv2d\(64, 8\), but its input is made by .*no weight"):
            model(picture().requires_grad_(input_has_gradients))
        assert not seen[0].is_layer or seen[0].n_out != C


@pytest.mark.parametrize("name", [*STAYS, *NO_SINGLE])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_bind_norms_sees_is_the_same(name, device, caplog):
    model = bind_norms(net(name).to(device), picture())
    assert (model.norm.num_groups, model.norm.in_channels) == expected(name)
    assert (model.norm.weight_layer == NO_LAYER) == (name in NO_SINGLE)
    warned = "changed the number of groups of 1 norms: norm: 8 -> 1"
    assert (warned in caplog.text) == (name in NO_SINGLE)
    if device == "cpu":
        model.train()(picture())


@pytest.mark.parametrize("name", ["LoRA", "LoRA of tokens", "a gain", "a time embedding"])
def test_a_frozen_layer_with_what_is_trained_beside_it(name):
    model, seen = net(name), []
    model.conv.requires_grad_(False)
    getattr(model, "linear", model.conv).requires_grad_(False)
    model.norm.register_forward_pre_hook(lambda norm, args: seen.append(made_by(args[0])))
    model(picture())
    assert seen == [None]
    assert bind_norms(model, picture()).norm.num_groups == 8


def test_a_product_is_a_layer_only_where_its_factor_is_a_weight():
    adjacency = torch.rand(9, 9)
    linear = nn.Linear(64, 9)
    for product in (lambda h: adjacency @ h, lambda h: h @ adjacency, lambda h: (h.softmax(0) @ h.t()).t()):
        made = made_by(product(linear(torch.randn(9, 64))))
        assert made is None or not made.is_layer
        model = nn.Sequential(linear, Function(product), PracticalGroupNorm(9))
        assert bind_norms(model, torch.randn(9, 64))[2].num_groups == 1


def test_graphs_that_training_cannot_tell_apart_but_bind_norms_can(caplog):
    for hide in (lambda h: h.detach(), None):
        model = Net(lambda net, x: net.conv(x) + (hide or (lambda h: h))(net.other(x)), SEVERAL)
        if hide is None:
            model.other.requires_grad_(False)
        model(picture())
        bind_norms(model, picture())
        assert model.norm.weight_layer == NO_LAYER
    assert caplog.text.count("norm: 8 -> 1") == 2


@pytest.mark.parametrize("shape", [(2, 64), (2, 7, 64)])
def test_an_embedding_has_full_size_beside_vectors_alone(shape):
    def add(net, x):
        h = net.linear(x) + net.time(x if x.dim() == 2 else x.mean(1, keepdim=True))
        return h if h.dim() == 2 else h.mT

    model = Net(add, {"linear": nn.Linear(64, C), "time": nn.Linear(64, C)})
    made = made_by(model.run(model, torch.randn(shape)))
    assert made.is_layer == (len(shape) == 3)
    model.norm.num_groups = 1
    (run,) = find_producers(model, [model.norm], torch.randn(shape))[model.norm]
    assert run.is_layer == made.is_layer


def test_an_embedding_alone_is_no_layer_of_maps():
    model = Net(lambda net, x: net.time(vector(x))[..., None, None] + x[:, :C], {"time": nn.Linear(64, C)})
    made = made_by(model.run(model, picture()))
    assert made is None or not made.is_layer
    assert bind_norms(model, picture()).norm.weight_layer == NO_LAYER


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_all_names_are_in_the_warning(caplog):
    blocks = [net("residual sum") for _ in range(30)]

    class Blocks(nn.ModuleList):
        def forward(self, x):
            return [block(x) for block in self]

    with caplog.at_level(logging.WARNING):
        bind_norms(Blocks(blocks), picture())
    (record,) = caplog.records
    assert all(f"{index}.norm: 8 -> 1" in record.getMessage() for index in range(30))


def test_another_layer_with_which_the_groups_are_the_same_is_no_error():
    model = Net(lambda net, x: net.small(x[:, :4]), {"small": conv(4)})
    model.norm = PracticalGroupNorm(C)
    model.norm.bind(C, "Conv2d(8, 8)")
    model(picture())
    standardized = PracticalGroupNorm(C, weight_standardization=True)
    standardized.bind(C, "Conv2d(8, 8)")
    model.norm = standardized
    with pytest.raises(InputError, match=r"\+WS was bound to"):
        model(picture())


def test_a_batch_as_a_loader_gives_it():
    labels, model = torch.zeros(2), net("a gain")
    for batch in ((picture(), labels), [picture(), labels], (picture(), labels, labels), {"x": picture()}):
        assert find_producers(model, [model.norm], batch)[model.norm][0].n_in == 64
    with pytest.raises(InputError, match=r"Net cannot be run with them .*: TypeError: "):
        find_producers(model, [model.norm], [picture()])


def test_channels_that_another_layer_writes():
    def write(net, x):
        h = net.conv(x)
        h[:, 4:] = net.other(x)[:, 4:]
        return h

    model = Net(write, SEVERAL)
    assert made_by(write(model, picture())) is None, "autograd does not show what was written"
    assert bind_norms(model, picture()).norm.weight_layer == NO_LAYER


def test_an_input_that_the_model_changes():
    """Within inference mode, too, where PyTorch would forbid it for a copy that was made there."""
    model = Net(lambda net, x: net.conv(x.mul_(2)))
    for mode in (False, True):
        with torch.inference_mode(mode):
            x = torch.ones(2, 64, SIZE, SIZE)
            assert bind_norms(model, x).norm.num_groups == 8
        assert torch.equal(x, torch.ones_like(x))


def test_products_of_integers_have_no_layer():
    model = Net(lambda net, x: net.conv(x) * (torch.eye(SIZE).long() @ torch.ones(SIZE, SIZE).long()))
    assert bind_norms(model, picture()).norm.num_groups == 8


def test_one_name_for_an_op_wherever_it_shows():
    for names in (
        ("aten::_unsafe_view", "UnsafeViewBackward0", "UnsafeView"),
        ("aten::max_pool2d_with_indices", "MaxPool2DWithIndicesBackward0"),
        ("aten::copy_", "CopyBackwards"),
        ("aten::add_", "AddBackward0"),
        ("copy_slices", "torch::autograd::CopySlices"),
    ):
        assert len({op_kind(name) for name in names}) == 1, names


# (name, number of maps it takes, what it makes of them): parts of a random graph of maps (2, C, SIZE, SIZE)
def hypothesis_ops():
    def through_a_layer(kind):
        return lambda net, h: net.layer(kind)(h)

    def linear(net, h):
        return net.layer("linear")(h.flatten(2).mT).mT.reshape(h.shape)

    def excite(net, h):
        return h * net.layer("conv")(h.mean((2, 3), keepdim=True)).sigmoid()

    def write(net, h, other):
        h = h.clone()
        h[:, :, 1:] = other[:, :, 1:]
        return h

    def product(net, h):
        return (net.parameter((C, C)) @ h.flatten(2)).view(h.shape)

    return [
        ("conv", 1, through_a_layer("conv")),
        ("conv", 1, through_a_layer("conv")),
        ("bottleneck", 1, through_a_layer("bottleneck")),
        ("LoRA", 1, lambda net, h: net.layer("conv")(h) + net.layer("bottleneck")(h)),
        ("linear", 1, linear),
        ("product", 1, product),
        ("relu", 1, lambda net, h: F.relu(h)),
        ("relu_", 1, lambda net, h: F.relu_(h * 2)),
        ("softmax", 1, lambda net, h: h.softmax(1)),
        ("pool", 1, lambda net, h: F.avg_pool2d(h, 3, 1, 1)),
        ("norm", 1, lambda net, h: F.group_norm(h, 2)),
        ("affine", 1, lambda net, h: h * net.parameter((C, 1, 1)) + net.parameter((C, 1, 1))),
        ("scale", 1, lambda net, h: 1 - h / 2),
        ("dropout", 1, lambda net, h: F.dropout(h, 0.5, net.training)),
        ("noise", 1, lambda net, h: h + torch.randn_like(h)),
        ("position", 1, lambda net, h: h + F.interpolate(net.parameter((1, C, 2, 2)), size=SIZE)),
        ("centered", 1, lambda net, h: h - h.mean((2, 3), keepdim=True)),
        ("mixup", 1, lambda net, h: h.lerp(h[[1, 0]], 0.3)),
        ("turned", 1, lambda net, h: h.transpose(2, 3).flip(2).roll(1, 3).contiguous()),
        ("padded", 1, lambda net, h: F.pad(h, (1, 1, 1, 1))[:, :, 2:, :-2]),
        ("excite", 1, excite),
        ("expanded", 1, lambda net, h: h + net.layer("conv")(h.amax((2, 3), keepdim=True)).expand_as(h)),
        ("resized", 1, lambda net, h: F.interpolate(F.max_pool2d(h, 2), scale_factor=2.0)),
        (
            "attention",
            1,
            lambda net, h: (h.flatten(2).mT @ h.flatten(2)).softmax(1).matmul(h.flatten(2).mT).mT.view(h.shape),
        ),
        ("add", 2, lambda net, a, b: a + b),
        ("add", 2, lambda net, a, b: a + b),
        ("add_", 2, lambda net, a, b: (a * 1).add_(b)),
        ("copy_", 2, lambda net, a, b: (a * 1).copy_(b)),
        ("mul", 2, lambda net, a, b: a * b.sigmoid()),
        ("div", 2, lambda net, a, b: a / (b.square() + 1)),
        ("where", 2, lambda net, a, b: torch.where(b > 0, a, b)),
        ("maximum", 2, lambda net, a, b: torch.maximum(a, b)),
        ("cat", 2, lambda net, a, b: torch.cat([a[:, ::2], b[:, 1::2]], 1)),
        ("write", 2, write),
    ]


OPS = hypothesis_ops()


class Graph(nn.Module):
    """A random graph. Its layers and parameters are made when it first runs."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.parts, self.next = steps, nn.ModuleList(), 0
        self.norm = nn.GroupNorm(1, C)

    def layer(self, kind):
        made = {
            "conv": lambda: conv(C),
            "linear": lambda: nn.Linear(C, C),
            "bottleneck": lambda: nn.Sequential(conv(C, 2), conv(2)),
        }
        return self._part(made[kind])

    def parameter(self, shape):
        return self._part(lambda: nn.ParameterList([torch.randn(shape)]))[0]

    def _part(self, make):
        if self.next == len(self.parts):
            self.parts.append(make())
        self.next += 1
        return self.parts[self.next - 1]

    def forward(self, x):
        self.next = 0
        maps = [x]
        for op, *operands in self.steps:
            _, arity, function = OPS[op]
            maps.append(function(self, *(maps[-1 - index % len(maps)] for index in operands[:arity])))
        return self.norm(maps[-1])


STEPS = st.lists(
    # operands are counted from the last map
    st.tuples(st.integers(0, len(OPS) - 1), st.integers(0, 2), st.integers(0, 4)),
    min_size=2,
    max_size=12,
)


def check_agreement(steps, input_has_gradients):
    """Training and a run see the same layer, or that there is no single one."""
    model, seen = Graph(steps), []
    x = torch.randn(2, C, SIZE, SIZE)
    model.eval()(x)
    (run,) = find_producers(model, [model.norm], x)[model.norm]
    model.norm.register_forward_pre_hook(lambda norm, args: seen.append((made_by(args[0]), args[0].requires_grad)))
    model.train()(x.requires_grad_(input_has_gradients))
    ((trained, has_gradient),) = seen
    names = [OPS[op][0] for op, *_ in steps]
    if not has_gradient:
        return
    if trained is None:  # writing does not show, nor whether what is beside an adapter is a frozen layer
        assert not run.is_layer or run.n_in == 2 or "write" in names, (names, run)
        return
    assert trained.is_layer == run.is_layer, (names, trained, run)
    if run.is_layer:
        assert trained[1:3] == run[1:3]
        weights = {p.untyped_storage().data_ptr() for p in run.layer.parameters()}
        assert trained.weight.variable.untyped_storage().data_ptr() in weights, (names, trained, run)


def agreement(examples):
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@agreement(60)
@given(STEPS, st.booleans())
def test_training_and_a_run_agree_on_random_graphs(steps, input_has_gradients):
    check_agreement(steps, input_has_gradients)


@pytest.mark.slow
@agreement(500)
@given(STEPS, st.booleans())
def test_training_and_a_run_agree_on_many_random_graphs(steps, input_has_gradients):
    check_agreement(steps, input_has_gradients)
