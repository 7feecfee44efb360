"""Norms computed again in the backward pass: the same bits as without, in less memory, in all that a job does."""

import copy
import glob
import io
import itertools
import pickle
import random
from collections import Counter, OrderedDict
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import ready_process
import torch
import torchvision
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads import mask_head
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from needs import PARAMETRIZED_WEIGHT_NORM, RECOMPUTE
from recorder import Recorder
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from gng_d2 import (
    GroupNorm,
    PracticalGroupNorm,
    WSConv2d,
    bind_norms,
    convert_norms,
    fold_weight_standardization,
    fuse_norms,
    practical_num_groups,
    recompute_norms,
    recomputed_modules,
)
from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from gng_d2.layers.class_change import has, original_class
from gng_d2.ops import group_norm_cpu, set_kernels_enabled
from study.comparison import Comparison

pytestmark = [pytest.mark.slow, RECOMPUTE]

OPS = "statistics", "apply"
SCRATCH = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]


def chain(*more):
    """Two blocks whose 3x3 convolutions are dear enough to be kept."""
    return nn.Sequential(
        *(nn.Conv2d(3, 128, 3, padding=1), GroupNorm(8, 128), nn.ReLU(inplace=True)),
        *(nn.Conv2d(128, 128, 3, padding=1), GroupNorm(8, 128), nn.ReLU(inplace=True), *more),
    )


def short_chain(channels):
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())


def images(count=2, size=16):
    return torch.randn(count, 3, size, size)


def gradients(model, *inputs):
    """Of the mean square of the outputs; the random stream after it, too."""
    model.zero_grad()
    torch.manual_seed(5)
    outputs = model(*inputs)
    outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
    sum(y.float().square().mean() for y in outputs).backward()
    return {**{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, "": torch.rand(1)}


def assert_same(found, expected):
    assert found.keys() == expected.keys() and len(found) > 1
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


# bits


def detector_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(5)
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **{name: loss.detach() for name, loss in losses.items()}}


def batch_of(cfg, height=96, width=128):
    instances = Instances((height, width), gt_boxes=Boxes(torch.tensor([[8.0, 8, 72, 80], [40, 16, 120, 90]])))
    instances.gt_classes = torch.tensor([0, 1])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 8:80, 8:72], masks[1, 16:90, 40:120] = True, True
    instances.gt_masks = BitMasks(masks)
    semantic = torch.randint(0, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, (height, width))
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return [{"image": image, "instances": instances, "sem_seg": semantic, "height": height, "width": width}]


@pytest.mark.parametrize(
    "config_file",
    [*sorted(glob.glob("configs/**/*pgn*.yaml", recursive=True)), "configs/quick/faster_rcnn_gn1_ws.yaml"],
)
def test_detectors_have_the_same_gradients(config_file):
    cfg = load_config(config_file, [*SCRATCH, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"])
    model, batch = build_model(cfg).train(), batch_of(cfg)
    expected = detector_gradients(model, batch)
    keys = list(model.state_dict())
    recompute_norms(model)
    assert list(model.state_dict()) == keys
    assert_same(detector_gradients(model, batch), expected)


def torchvision_fpn(norm_layer):
    body = torchvision.models.resnet18(norm_layer=norm_layer)
    make = torchvision.models.detection.backbone_utils.BackboneWithFPN
    return make(body, {"layer1": "0", "layer2": "1"}, [64, 128], 64, norm_layer=norm_layer)


@pytest.mark.parametrize(
    "make, modules",
    [
        (torchvision.models.resnet18, 8),
        (torchvision.models.mobilenet_v2, 19),
        (torchvision.models.efficientnet_b0, 18),  # its activations follow convolutions in place, too
        (torchvision_fpn, 5),
    ],
)
def test_torchvision(make, modules):
    model = make(norm_layer=lambda channels: nn.GroupNorm(4, channels)).train()
    inputs = images(1, 32)
    expected = gradients(model, inputs)
    assert len(recomputed_modules(recompute_norms(model))) == modules
    for _ in range(2):  # the first time, some outputs prove to be changed in place
        assert_same(gradients(model, inputs), expected)


@pytest.mark.parametrize(
    "name, options, modules",
    [
        pytest.param("resnet50_gn", {}, 16),
        ("seresnet50", {"norm_layer": lambda c, **_: nn.GroupNorm(4, c), "drop_path_rate": 0.3, "drop_rate": 0.3}, 16),
        pytest.param("resnetv2_50x1_bit", {}, 16),
        ("convnext_atto", {"drop_path_rate": 0.3}, 16),
    ],
)
def test_timm(name, options, modules):
    timm = pytest.importorskip("timm")
    model, inputs = timm.create_model(name, **options).train(), images(1, 32)
    expected = gradients(model, inputs)
    assert len(recomputed_modules(recompute_norms(model))) == modules
    for _ in range(2):
        assert_same(gradients(model, inputs), expected)


def test_heads():
    norm = "GN16"
    box = torch.randn(3, 32, 8, 8)
    levels = [torch.randn(1, 32, 16, 16), torch.randn(1, 32, 8, 8)]
    retina = RetinaNetHead(
        input_shape=[ShapeSpec(channels=32)] * 2, num_classes=3, num_anchors=1, conv_dims=[32] * 2, norm=norm
    )
    mask = MaskRCNNConvUpsampleHead(ShapeSpec(channels=32), num_classes=3, conv_dims=[32] * 3, conv_norm=norm)
    shape = {"p2": ShapeSpec(channels=32, stride=4), "p3": ShapeSpec(channels=32, stride=8)}
    semantic = SemSegFPNHead(shape, num_classes=3, conv_dims=32, common_stride=4, norm=norm)
    runs = {
        "retina": (retina, lambda: sum(y.square().sum() for ys in retina(levels) for y in ys), 2),
        "mask": (mask, lambda: mask.layers(box).square().sum(), 1),
        "semantic": (semantic, lambda: semantic.layers(dict(zip(shape, levels))).square().sum(), 1),
    }
    for head, loss, modules in runs.values():
        expected = torch.autograd.grad(loss(), list(head.parameters()))
        recompute_norms(head)
        assert len(recomputed_modules(head)) == modules
        assert all(map(torch.equal, torch.autograd.grad(loss(), list(head.parameters())), expected))


def test_the_loss_of_a_mask_head_is_computed_once(monkeypatch):
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=32), num_classes=3, conv_dims=[32] * 3, conv_norm="GN16")
    calls = []
    monkeypatch.setattr(mask_head, "mask_rcnn_loss", lambda x, *_: calls.append(1) or x.square().mean())
    recompute_norms(head)(torch.randn(2, 32, 8, 8), [])["loss_mask"].backward()
    assert calls == [1]


def test_dropout_draws_the_same_again():
    model, inputs = chain(nn.Dropout(0.4), nn.Conv2d(128, 8, 3), GroupNorm(2, 8), nn.Dropout2d(0.4)), images()
    expected = gradients(model, inputs)
    assert_same(gradients(recompute_norms(model), inputs), expected)


def test_a_convolution_without_norm_may_be_changed_in_place():
    """As in squeeze-excite blocks. It cannot be kept, and then is not; the random stream is the same, too."""
    layers = nn.Conv2d(3, 128, 3), nn.Dropout(0.5), nn.Conv2d(128, 128, 3), nn.SiLU(inplace=True), *chain()[1:]
    model, inputs = nn.Sequential(*layers), images()
    expected = gradients(model, inputs)
    recompute_norms(model)
    for _ in range(2):  # the first run is watched, and the second keeps what it can
        assert_same(gradients(model, inputs), expected)


class OverMaps(nn.Sequential):
    """Runs its layers over each of several feature maps, as a head does."""

    def forward(self, maps):
        return torch.stack([super(OverMaps, self).forward(x).mean() for x in maps])


@pytest.mark.parametrize("threads", [1, 2])  # which of our kernels run depends on the size and the threads
@pytest.mark.parametrize("runs", [[[16], [80], [16]], [[80], [16]], [[16], [16, 16, 16]], [[16, 32], [80]]])
def test_images_of_another_size_and_other_numbers_of_maps(runs, threads):
    layers = nn.Conv2d(96, 96, 3), nn.ReLU(inplace=True), nn.Conv2d(96, 96, 3), nn.Hardswish(inplace=True)
    model = OverMaps(GroupNorm(1, 96), *layers, nn.Conv2d(96, 96, 3))
    plain = copy.deepcopy(model)
    recompute_norms(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for sizes in runs:
            torch.manual_seed(0)
            maps = [torch.randn(1, 96, size, size) for size in sizes]
            for m in (plain, model):
                m.zero_grad()
                m(maps).square().sum().backward()
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters()))
    finally:
        torch.set_num_threads(before)


class Growing(nn.Module):
    """Its runs have one convolution more each, of another width; the output of every second one is changed in place."""

    def __init__(self):
        super().__init__()
        self.norm, self.runs = GroupNorm(2, 96), 0
        self.convs = nn.ModuleList(nn.Conv2d(96, 96, (3, 3 + 2 * i), padding=(1, 1 + i)) for i in range(4))
        self.last = nn.Conv2d(96, 8, 1)

    def forward(self, x):
        x, self.runs = self.norm(x), self.runs + 1
        for i, conv in enumerate(self.convs[: self.runs]):
            x = nn.functional.silu(conv(x), inplace=i % 2 == 1)
        return self.last(x)


def test_kinds_of_outputs_that_come_later():
    """Of runs with 1, 2, 3, 4, 4, 4 expensive convolutions: the new one is computed again, and each second one."""
    model = Growing()
    plain, runs = copy.deepcopy(model), []
    recompute_norms(model)
    for _ in range(6):
        x = torch.randn(1, 96, 9, 9)
        with Recorder() as recorder:
            model(x).square().sum().backward()
        runs.append(recorder.ops.count("aten.convolution.default"))
        plain(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters()))
    # in the forward pass; again the last and cheap one, as the first three runs are checked; again what is not kept
    assert runs == [2 + 1 + 1, 3 + 1 + 1, 4 + 1 + 2, 5 + 2, 5 + 2, 5 + 2]


@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.mul_(0.5), lambda y: y[:, :4].zero_() is None or y])
def test_what_a_block_returns_may_be_changed_by_its_caller(change):
    block = nn.Sequential(*(nn.GroupNorm(2, 96), nn.ReLU(), nn.Conv2d(96, 96, 3)) * 2)
    plain = copy.deepcopy(block)
    recompute_norms(block)
    for _ in range(5):
        x = torch.randn(1, 96, 8, 8)
        for model in (block, plain):
            change(model(x)).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(block.parameters(), plain.parameters()))


def test_a_convolution_that_is_changed_in_place_later_is_an_error_that_names_the_block():
    class Block(nn.Sequential):
        def forward(self, x):
            y = self[1](self[0](x))
            return self[2](y.relu_() if self.changes else y.relu())

    model = nn.Sequential(nn.Identity(), Block(GroupNorm(2, 96), nn.Conv2d(96, 96, 3), GroupNorm(2, 96)))
    recompute_norms(model)
    for model[1].changes in (False, False):
        model(torch.randn(1, 96, 8, 8)).sum().backward()
    model[1].changes = True
    with pytest.raises(
        InputError, match=r"^1: the output of a convolution in it was changed in place, and.*enable=False"
    ):
        model(torch.randn(1, 96, 8, 8)).sum().backward()


def test_an_expensive_convolution_is_kept_from_the_second_run_on():
    model = nn.Sequential(GroupNorm(2, 96), nn.Conv2d(96, 96, 3), nn.SiLU(), nn.Conv2d(96, 8, 1))
    recompute_norms(model)
    runs = []
    for size in (16, 16, 32):
        with Recorder() as recorder:
            model(torch.randn(1, 96, size, size)).sum().backward()
        runs.append(recorder.ops.count("aten.convolution.default"))
    assert runs == [4, 3, 3]  # the 1 x 1 one is cheap, and computed again each time


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)])
def test_a_module_that_changes_its_input_is_an_error(first):
    """With an input that needs no gradient, its gradients would be others without a word."""
    module = nn.Sequential(first, *chain())
    recompute_norms(module)
    for inputs in (images(), images().requires_grad_() * 1):
        with pytest.raises(InputError, match="changes its input in place.*inplace=False"):
            module(inputs)


def test_an_input_changed_in_place_is_an_error():
    model, inputs = recompute_norms(chain()), images()
    y = model(inputs)
    inputs.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# what a second run may find changed


class Block(nn.Module):
    """A block of a user's own, named in a model; ``scale`` gives it something to compute with its output."""

    def __init__(self, scale):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), scale
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.seen, self.last = 0, [], None

    def forward(self, x, *more):
        return self.scale(self, self.norm(self.conv(x)).abs(), *more).sigmoid()


def count(block, x):
    block.calls += 1
    return x * block.calls


def step_on(block, x):
    block.steps = block.steps * 0.5 + 1
    return x * block.steps


def see(block, x):
    block.seen.append(len(block.seen))
    return x * len(block.seen)


def stash(block, x):
    block.last = x if block.last is None else 0.9 * block.last.detach() + x
    return block.last


def fill(block, x, features, named):
    features.append(x)
    named["last"] = x
    return x * len(features)


def empty(block, x, features, named):
    return x * features.pop() + named.pop("scale")


REPEATED = {
    "a counter": (count, lambda: ()),
    "a buffer reassigned": (step_on, lambda: ()),
    "a list of its own": (see, lambda: ()),
    "an average of tensors": (stash, lambda: ()),
    "the caller's list and dict": (fill, lambda: ([], {})),
    "taken from the caller's": (empty, lambda: ([1.0, torch.tensor(2.0)], {"scale": torch.tensor(0.5)})),
    "Python's random numbers": (lambda block, x: x * random.random(), lambda: ()),
    "NumPy's random numbers": (lambda block, x: x * torch.from_numpy(np.random.rand(8, 1, 1)).float(), lambda: ()),
    "dropout": (lambda block, x: nn.functional.dropout(x, 0.5, block.training), lambda: ()),
}


@pytest.mark.parametrize("case", REPEATED)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_second_run_finds_what_the_first_one_found(case, in_place):
    """Gradients, and all that the block or its caller keeps; also where the first step runs twice."""
    scale, more = REPEATED[case]
    found = []
    for recomputed in (False, True):
        block, steps = Block(scale), []
        if in_place:
            block.conv = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.SiLU(True), nn.Conv2d(128, 8, 3))
        for p in block.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
        if recomputed:
            recompute_norms(block)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        for _ in range(3):
            args = more()
            loss = block.train()(torch.randn(2, 3, 8, 8), *args).square().mean()
            block.eval()  # as where a model is evaluated before its loss goes backward
            steps.append([loss, *torch.autograd.grad(loss, list(block.parameters())), block.steps, block.last])
            steps[-1] += [*tree_flatten(args)[0], block.calls, *block.seen, random.random(), np.random.rand()]
        found.append(tree_flatten(steps)[0])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*found))


def test_functional_call_computes_again_with_the_weights_that_it_was_called_with():
    block, x = Block(lambda block, x: x), torch.randn(2, 3, 8, 8)
    weights = {name: torch.randn_like(p, requires_grad=True) for name, p in block.named_parameters()}

    def gradients_of_weights():
        return torch.autograd.grad(functional_call(block, weights, x).square().mean(), list(weights.values()))

    expected = gradients_of_weights()
    recompute_norms(block)
    assert all(map(torch.equal, gradients_of_weights(), expected))


def drawn_from(draw):
    return lambda block, x: x * draw()


def cut_to(draw):
    return lambda block, x: x[:, :, : draw()].clone()


DIFFERENT = {
    "an iterator": lambda: drawn_from(itertools.count(1).__next__),
    "a list that is emptied": lambda: drawn_from([1.0, 2.0, 3.0].pop),
    "a generator of its own": lambda: drawn_from(partial(torch.rand, 8, 1, 1, generator=torch.Generator())),
    "a generator of NumPy's": lambda: drawn_from(np.random.default_rng(0).random),
    "a generator of Python's": lambda: drawn_from(random.Random(0).random),
    "a mask": lambda: lambda block, x, own=torch.Generator(): x * (torch.rand(x.shape, generator=own) > 0.5),
    "a file": lambda: drawn_from(lambda file=io.StringIO("1\n2\n3\n"): float(file.readline())),
    "another shape": lambda: cut_to(itertools.count(3).__next__),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_run_that_computes_something_else_is_an_error_that_names_the_block(case, dtype):
    model = nn.ModuleDict({"stem": Block(DIFFERENT[case]())}).to(dtype)
    y = recompute_norms(model)["stem"](torch.randn(2, 3, 64, 64, dtype=dtype))
    with pytest.raises(InputError, match="^stem: its output is another one when it is computed again"):
        y.square().mean().backward()


def test_outputs_are_compared_in_the_first_runs_and_then_in_one_of_a_thousand():
    block = recompute_norms(Block(lambda block, x: x))
    compared = [bool(block(images()[:1]).mean().backward()) or block._kept.runs for _ in range(2)]
    assert compared == [1, 2]
    for runs, differs in ((2, True), (3, False), (999, False), (1000, True), (2000, True)):
        block._kept.runs, block.scale = runs, drawn_from(itertools.count(1).__next__)
        loss = block(images()).mean()
        with pytest.raises(InputError) if differs else nullcontext():
            loss.backward()


def test_what_rounding_does_is_no_difference():
    """Values around zero, whose sum is nearly zero, in another order or with noise of their type's precision."""
    for dtype in (torch.float32, torch.bfloat16):
        noise = iter([0, torch.finfo(dtype).eps])
        block = Block(lambda block, x, noise=noise: (x + next(noise) * torch.randn_like(x)) * 4)
        recompute_norms(block.to(dtype))(torch.randn(2, 3, 16, 16, dtype=dtype)).mean().backward()


def test_no_tensor_is_held_to_compare_outputs():
    model, inputs = recompute_norms(chain()), images()
    model(inputs).sum().backward()
    sizes = [bytes_left(lambda: model(inputs))[1] for _ in range(4)]
    assert model._kept.runs == 5 and len(set(sizes)) == 1  # the last runs are not compared


def test_an_optimizer_that_steps_before_the_backward_pass_is_an_error():
    model, x = nn.ModuleDict({"stem": chain()}), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recompute_norms(model)["stem"](x).mean().backward()
    loss = model["stem"](x).mean()
    optimizer.step()
    with pytest.raises(InputError, match="^stem: its weights changed before the backward pass"):
        loss.backward()


@pytest.mark.parametrize("kind", ["buffer", "attribute", "list"])
def test_a_tensor_of_a_block_that_changes_before_the_backward_pass_is_an_error(kind):
    """Also in runs whose outputs are not compared. The addition keeps nothing, so that PyTorch alone allows it."""
    block = Block(lambda block, x: x + (block.seen[0] if kind == "list" else block.steps))
    if kind == "attribute":
        del block.steps
        block.steps = torch.zeros(())
    block.seen = [torch.zeros(())]
    model, x = recompute_norms(nn.ModuleDict({"stem": block})), images()
    for _ in range(4):
        model["stem"](x).mean().backward()
    loss = model["stem"](x).mean()
    (block.seen[0] if kind == "list" else block.steps).add_(5)
    with pytest.raises(InputError, match="^stem: its weights changed before the backward pass, or its buffers"):
        loss.backward()


# memory


def bytes_left(call):
    """What ``call`` returns, and what it leaves allocated while that is held, as PyTorch's profiler reports it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    return result, sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_only_inputs_outputs_and_dear_convolutions_are_kept():
    model, inputs = chain(), images(2, 32)
    map_of_128 = 2 * 128 * 32 * 32 * 4
    model(inputs).sum().backward()
    _, before = bytes_left(lambda: model(inputs))
    assert 4 * map_of_128 <= before < 4.2 * map_of_128  # two convolutions, two norms, whose ReLUs are in place
    recompute_norms(model)(inputs)  # is watched, and keeps nothing of what an in-place op could change
    _, after = bytes_left(lambda: model(inputs))
    assert 2 * map_of_128 <= after < 2.2 * map_of_128  # the dear convolution (128 x 9) and the output, not 3 x 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_statistics_are_kept_and_applied_again(fused, dtype, monkeypatch):
    """With our kernels. The fused op that ends a residual block does not run again: the next block keeps its output."""
    monkeypatch.setattr(group_norm_cpu, "is_faster", lambda x, *_: x.is_contiguous())
    blocks = [BottleneckBlock(i, 32, bottleneck_channels=64, norm="GN4+WS") for i in (16, 32)]
    model, inputs = nn.Sequential(*blocks).to(dtype).train(), torch.randn(1, 16, 8, 8, dtype=dtype)
    fuse_norms(model, fused)

    def ops_and_gradients():
        with Recorder() as forward:
            loss = model(inputs).square().mean()
        with Recorder() as backward:
            found = torch.autograd.grad(loss, list(model.parameters()))
        return [
            ops.ops.count(f"gng_d2.group_norm_{name}.default") for ops in (forward, backward) for name in OPS
        ], found

    counts, expected = ops_and_gradients()
    assert counts == [7, 7, 0, 0]  # three in each block, and one of a shortcut
    recompute_norms(model)
    for _ in range(4):
        counts, found = ops_and_gradients()
        assert all(map(torch.equal, found, expected))
    assert counts == [7, 7, 0, 5 if fused else 7]


def test_standardized_weights_are_not_kept():
    model = nn.Sequential(
        Conv2d(256, 256, 3, padding=1, bias=False, norm=get_norm("PGN+WS", 256)),
        Conv2d(256, 256, 3, padding=1, bias=False, norm=get_norm("PGN+WS", 256)),
    )
    inputs, weight = torch.randn(1, 256, 4, 4), 256 * 256 * 9 * 4
    assert bytes_left(lambda: model(inputs))[1] > 2 * weight
    assert bytes_left(lambda: recompute_norms(model)(inputs))[1] < weight / 10


def test_a_graph_that_is_dropped_leaves_nothing():
    model, inputs = recompute_norms(chain()), images()
    model(inputs).sum().backward()
    assert bytes_left(lambda: model(inputs))[1] > 2**18
    assert bytes_left(lambda: model(inputs) is None)[1] < 2**15


# which modules


def test_the_modules_of_a_detector_are_logged(caplog):
    cfg = load_config("configs/quick/faster_rcnn_pgn_ws.yaml", SCRATCH)
    with caplog.at_level("INFO"):
        model = recompute_norms(build_on_meta(cfg))
    names = recomputed_modules(model)
    blocks = [f"backbone.bottom_up.res{stage}.{block}" for stage in (2, 3, 4, 5) for block in (0, 1)]
    levels = [f"backbone.fpn_{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)]
    assert set(names) == {"backbone.bottom_up.stem", *blocks, *levels, "roi_heads.box_head"}
    assert "computed again in the backward pass: 32 of 32 norms" in caplog.text
    assert all(name in caplog.text for name in names)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        torchvision.models.resnet18(),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True)),
        nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)), nn.GroupNorm(2, 8)),
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), nn.GroupNorm(2, 8)),
        nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)),
        nn.ModuleList([nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)]),
    ],
    ids=["no norm", "BN", "statistics", "spectral norm", "spectral parametrization", "no convolution", "a list"],
)
def test_a_model_in_which_nothing_is_found_is_an_error(model):
    before = [type(m) for m in model.modules()]
    with pytest.raises(InputError, match=f"{type(model).__name__} has no module that holds convolutions with norms"):
        recompute_norms(model)
    assert [type(m) for m in model.modules()] == before


class WithListOfLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)

    def layers(self):
        return [self.conv, self.norm]

    def forward(self, x):
        for layer in self.layers():
            x = layer(x)
        return x


def test_a_method_layers_without_inputs_is_not_what_is_recomputed():
    model = WithListOfLayers()
    assert bytes_left(lambda: model(images()))[1] > bytes_left(lambda: recompute_norms(model)(images()))[1]


def test_batch_norm_among_them_stays_as_it_is():
    with_batch_norm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8))
    model = nn.Sequential(with_batch_norm, short_chain(8))
    recompute_norms(model)
    assert recomputed_modules(model) == ["1"]
    gradients(model, images())
    assert model[0][1].num_batches_tracked == 1


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_what_wraps_a_model_is_not_taken(wrap):
    model = short_chain(3)
    recompute_norms(wrap(model))
    assert recomputed_modules(wrap(model))[0] in ("module", "_orig_mod") and recomputed_modules(model) == [""]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.norm(self.conv(x)) * self.calls


def test_a_module_that_changes_its_buffers_is_an_error():
    model = recompute_norms(Counting())
    with pytest.raises(InputError, match="RecomputedCounting: running it changes its buffers"):
        model(images())
    del model.calls
    model.calls = torch.zeros(())
    with pytest.raises(InputError, match="RecomputedCounting: running it changes its buffers or other tensors"):
        model(images())


# when not


@pytest.mark.parametrize("case", ["eval", "no_grad", "inference", "frozen", "traced"])
def test_where_nothing_is_kept_nothing_is_added(case, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("checkpoint was called")

    model, inputs = recompute_norms(chain()), images()
    monkeypatch.setattr(torch_checkpoint, "checkpoint", forbidden)
    if case == "eval":
        model.eval()(inputs).sum().backward()
    elif case == "no_grad":
        with torch.no_grad():
            model(inputs)
    elif case == "inference":
        with torch.inference_mode():
            model(inputs)
    elif case == "frozen":
        model.requires_grad_(False)(inputs)
    else:
        torch.jit.trace(model, inputs)


def test_compiled_backbone_has_the_same_gradients():
    """What to compute again is then the compiler's own choice."""
    torch._dynamo.reset()
    model, inputs = chain(), images()
    expected = gradients(model, inputs)
    compiled = torch.compile(nn.Sequential(recompute_norms(model)), backend="aot_eager")
    found = gradients(compiled, inputs)
    for (_, p), (_, q) in zip(found.items(), expected.items()):
        torch.testing.assert_close(p, q)


def test_compiled_layer_inside_a_block():
    torch._dynamo.reset()
    model, inputs = chain(), images()
    expected = gradients(model, inputs)
    model[3].compile(backend="aot_eager")
    assert_same(gradients(recompute_norms(model), inputs), expected)


def test_symbolic_trace_and_script():
    model = recompute_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())).eval()
    inputs = images()
    for of in (torch.fx.symbolic_trace, torch.jit.script):
        assert torch.equal(of(model)(inputs), model(inputs))


# what jobs do


def test_mixed_precision_has_the_same_gradients():
    model, inputs = chain(), images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, inputs)
        recompute_norms(model)
        assert_same(gradients(model, inputs), expected)


def test_mixed_precision_with_a_module_that_runs_on_five_levels():
    """Autocast casts its weights for the first level, and not for the others; so each is computed again."""
    tower = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), GroupNorm(8, 128), nn.ReLU())
    levels = [torch.randn(1, 128, size, size) for size in (16, 8, 4)]

    def run(whole):
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(tower(level).float().square().mean() for level in levels)
            if whole:  # the backward pass, too, as some trainers have it
                return torch.autograd.grad(loss, list(tower.parameters()))
        return torch.autograd.grad(loss, list(tower.parameters()))

    expected = [run(whole) for whole in (False, True)]
    recompute_norms(tower)
    for _ in range(2):
        assert all(map(torch.equal, run(False), expected[0]))
        assert all(map(torch.equal, run(True), expected[1]))


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])
def test_mixed_precision_of_torchvisions_heads(name):
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, min_size=64, max_size=64)
    model.train()
    images = [torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]

    def losses_and_gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(images, targets)
        sum(losses.values()).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {**found, **{name: loss.detach() for name, loss in losses.items()}}

    convert_norms(model, "PGN", images)
    expected = losses_and_gradients()
    recompute_norms(model)
    found = losses_and_gradients()
    for values in (found, expected):  # PyTorch's convolution of a single pixel has other bits each time
        del values["backbone.fpn.extra_blocks.p7.weight"]
    assert_same(found, expected)


def test_accumulated_gradients_and_two_passes_in_one_graph():
    model, first, second = chain(), images(), images()

    def accumulated():
        model.zero_grad()
        for inputs in (first, second):
            model(inputs).square().mean().backward()
        (model(first) * model(second)).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = accumulated()
    recompute_norms(model)
    assert_same(accumulated(), expected)


@pytest.mark.parametrize("frozen", [[0], [0, 1], [1, 3], [3, 4]])
def test_frozen_layers(frozen):
    model, inputs = chain(), images()
    for index in frozen:
        model[index].requires_grad_(False)
    expected = gradients(model, inputs)
    assert_same(gradients(recompute_norms(model), inputs), expected)


def test_the_switch_stands_as_it_stood_when_the_module_first_ran():
    model, inputs = chain(nn.Conv2d(128, 8, 1), GroupNorm(1, 8)), torch.randn(1, 3, 192, 192)
    expected, loss = {}, {}
    for name in ("kept", "recomputed"):
        with set_kernels_enabled("off"):
            loss[name] = model(inputs).square().mean()
        expected[name] = torch.autograd.grad(loss[name], list(model.parameters()))
        recompute_norms(model)
    assert all(map(torch.equal, expected["kept"], expected["recomputed"]))


def test_what_changes_layers_finds_those_that_are_taken():
    """As without: norms of another name, with and without weight standardization, bound anew, folded."""
    x = torch.randn(1, 16, 8, 8)
    first = Conv2d(16, 16, 3, norm=get_norm("PGN+WS", 16))
    models = [nn.Sequential(first, nn.Sequential(nn.Conv2d(16, 16, 1), nn.GroupNorm(2, 16), *short_chain(16)))]
    models.append(copy.deepcopy(models[0]))
    recompute_norms(models[1])
    changes = [
        lambda model: convert_norms(model, "PGN", x),
        lambda model: convert_norms(model, "GN4+WS", x),
        lambda model: bind_norms(model, x),
        fold_weight_standardization,
        fuse_norms,
    ]
    outputs = [models[0](x)]
    for change in changes:
        expected, found = (change(model)(x) for model in models)
        assert torch.equal(expected, found)
        assert torch.allclose(expected, outputs[-1], atol=1e-5) == (change in changes[2:])
        outputs.append(expected)
        assert recomputed_modules(models[1]) == ["0", "1"] and recomputed_modules(models[0]) == []
        kinds, others = ([(original_class(m), has(m, WSConv2d)) for m in model.modules()] for model in models)
        assert kinds == others


def test_a_norm_that_binds_in_training_binds_once():
    """By what autograd says made its input, which it says when the block is computed again, too."""
    block = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Identity(), PracticalGroupNorm(128), nn.ReLU(), *short_chain(128))
    gradients(recompute_norms(block), images())
    assert block[2].num_groups == practical_num_groups(3, 128)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(inplace=True)])
def test_inside_a_checkpoint_of_ones_own(activation):
    block = nn.Sequential(nn.GroupNorm(2, 128), nn.Conv2d(128, 128, 3), activation, nn.Conv2d(128, 128, 1))
    model, inputs = nn.Sequential(chain(), block, short_chain(128)), images().requires_grad_()

    def run():
        return torch.autograd.grad(
            checkpoint(model, inputs, use_reentrant=False).square().mean(), [inputs, *model.parameters()]
        )

    expected = run()
    recompute_norms(model)
    assert all(map(torch.equal, run(), expected))
    assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved_and_loaded(m)]
)
def test_a_copy_computes_with_its_own_weights(copied):
    model, inputs = recompute_norms(chain()), images()
    expected = gradients(model, inputs)
    copy_of_it = copied(model)
    assert recomputed_modules(copy_of_it) == recomputed_modules(model) == [""]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same(gradients(copy_of_it, inputs), expected)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_it_is_undone():
    model = nn.Sequential(chain(), nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(True), *short_chain(128)))
    gradients(model, images())
    before = [(type(m), set(vars(m))) for m in model.modules()]
    gradients(recompute_norms(recompute_norms(model)), images())  # twice is as once
    assert recomputed_modules(model) == ["0", "1"]
    assert recompute_norms(model, enable=False) is model
    assert [(type(m), set(vars(m))) for m in model.modules()] == before


def test_hooks_inside_run_again():
    """As the page says."""
    model, calls = chain(), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    gradients(recompute_norms(model), images())
    assert calls == [1, 1]


def test_hooks_of_the_module_run_once_and_its_class_is_still_what_it_was():
    model, calls = chain(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    gradients(recompute_norms(model), images())
    assert calls == [1] and isinstance(model, nn.Sequential) and type(model).__name__ == "RecomputedSequential"
    assert isinstance(model[:2], nn.Sequential)


def test_a_second_backward_is_refused():
    model, inputs = recompute_norms(chain()), images()
    model(inputs)  # keeps nothing that could be used up
    loss = model(inputs).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Trying to backward an extra time"):
        loss.backward()


def ddp_gradients(path):
    """What each of two processes does."""
    torch.set_num_threads(1)
    rank, found = torch.distributed.get_rank(), {}
    for static, recomputed in itertools.product((False, True), repeat=2):
        torch.manual_seed(0)
        model = nn.Sequential(chain(), short_chain(128))
        if recomputed:
            recompute_norms(model)
        model = DistributedDataParallel(model, static_graph=static)
        for step in range(2):  # the first step of a static graph is another one
            torch.manual_seed(10 * step + rank)
            found[static, recomputed] = gradients(model, images())
    if rank == 0:
        torch.save(found, path)


def test_distributed(tmp_path):
    ready_process.launch(ddp_gradients, str(tmp_path / "found.pth"))
    found = torch.load(tmp_path / "found.pth")
    for static in (False, True):
        assert_same(found[static, True], found[static, False])


def test_a_comparison_passes_it_on_and_refuses_norms_without_use(shapes, tmp_path):
    overrides = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""]
    keys, config_file = ["MODEL.SEM_SEG_HEAD.NORM"], "configs/quick/pfpn_gn.yaml"
    comparison = Comparison(
        config_file, ["PGN", "FrozenBN"], [0], str(tmp_path), keys, [*SCRATCH, *overrides], recompute_norms=True
    )
    assert "--recompute-norms" in comparison.command(comparison.runs[0])
    with pytest.raises(InputError, match="PanopticFPN has no module that holds convolutions with norms"):
        comparison.check()


def test_a_slice_of_a_block():
    model, x = chain(), images()
    expected = gradients(copy.deepcopy(model)[:4], x)
    assert_same(gradients(recompute_norms(model)[:4], x), expected)


def test_a_block_that_takes_gradients_while_it_runs_is_named():
    def penalty(block, y):
        (slope,) = torch.autograd.grad(y.sum(), block.conv.weight, retain_graph=True)
        return y * slope.square().mean()

    model = recompute_norms(nn.ModuleDict({"stem": Block(penalty)}))
    with pytest.raises(InputError, match="stem: it takes gradients through itself while it runs"):
        model["stem"](images())


def test_autocast_of_its_own_inside_one_that_is_off():
    """The casts of weights live as long as the outer one, so a second run finds those of the first."""

    class Own(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    def grads(model):
        with torch.autocast("cpu", enabled=False):
            loss = (model(x) + model(2 * x)).square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    model, x = Own(*chain()), images()
    expected = grads(copy.deepcopy(model))
    recompute_norms(model)
    for _ in range(3):
        assert all(map(torch.equal, grads(model), expected))


def test_a_forward_of_the_instance_is_not_taken():
    model = nn.ModuleDict({"patched": chain(), "other": chain()})
    model["patched"].forward = nn.Sequential(*model["patched"]).forward
    assert recomputed_modules(recompute_norms(model)) == ["other"]


def test_a_graph_module_is_an_error():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()))
    with pytest.raises(InputError, match="a torch.fx GraphModule runs all of its ops at once"):
        recompute_norms(graph)


def test_replicas_of_data_parallel_count_as_one():
    model = recompute_norms(chain())
    for _ in range(4):
        replica = model._replicate_for_data_parallel()
        replica._parameters = dict(model._parameters)
        replica(images())
    assert model._kept.runs == 4


@PARAMETRIZED_WEIGHT_NORM
def test_below_a_subclass_of_pytorch_it_is_still_named():
    model = recompute_norms(nn.ModuleDict({"a": Block(lambda block, y: y)}))
    parametrize.register_parametrization(model["a"], "steps", nn.Identity())
    assert recomputed_modules(model) == ["a"]
    with pytest.raises(InputError, match="how it runs cannot be changed"):
        recompute_norms(model, enable=False)


@pytest.mark.parametrize("kind", [Counter, OrderedDict])
def test_a_dict_of_another_kind_is_written_once(kind):
    def tally(block, y):
        block.seen["runs"] = block.seen.get("runs", 0) + 1
        block.seen[len(block.seen)] = 1
        return y

    model = recompute_norms(Block(tally))
    model.seen = kind(a=2)
    gradients(model, images())
    assert list(model.seen.items()) == [("a", 2), ("runs", 1), (2, 1)]


@pytest.mark.parametrize("norms, last_first", [(4, False), (5, True)])
def test_a_long_sequential_runs_again_in_parts(norms, last_first):
    """As the features of a VGG: so the outputs of all its norms are never there at the same time."""
    blocks = [(nn.Conv2d(8, 8, 3, padding=1), GroupNorm(2, 8), nn.ReLU(inplace=True)) for _ in range(norms)]
    blocks.insert(2, (nn.MaxPool2d(2), nn.Dropout(0.2)))
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), *itertools.chain(*blocks)), images()
    expected = gradients(model, x)
    assert recomputed_modules(recompute_norms(model)) == [""]
    own, ran = [module for module in model if isinstance(module, GroupNorm)], []
    for number, norm in enumerate(own):
        norm.register_forward_hook(lambda *_, number=number: ran.append(number))
    for _ in range(3):
        ran.clear()
        assert_same(gradients(model, x), expected)
        assert ran[:norms] == list(range(norms))
        assert ran[norms:] == list(range(norms))[:: -1 if last_first else 1]
    y = model(input=x)
    assert y.shape == (2, 8, 8, 8)
