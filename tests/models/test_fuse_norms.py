"""Norms that run in one op with the shortcut and the activation after them: the same values, in all that a job does."""

import copy
import pickle
import random
import sys
from functools import partial
from itertools import permutations

import pytest
import torch
import torchvision
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from needs import COMPILE, EXPORT, HALF, LOOK, PARAMETRIZED_WEIGHT_NORM, RECOMPUTE
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten, tree_map
from torchvision.ops import Conv2dNormActivation

from gng_d2 import (
    GroupNorm,
    PracticalGroupNorm,
    bind_norms,
    convert_norms,
    fold_weight_standardization,
    fuse_norms,
    recompute_norms,
    to_plain,
)
from gng_d2.errors import InputError
from gng_d2.job.config import load_config
from gng_d2.layers.class_change import has
from gng_d2.layers.ws_conv import standardize, unstandardize
from gng_d2.ops import group_norm_cpu

MODULE = sys.modules["gng_d2.models.fuse_norms"]


@pytest.fixture
def ops(monkeypatch):
    """(activation, whether something is added) of each norm that ran in one op with what follows it."""
    seen, op = [], MODULE.group_norm

    def spy(input, num_groups, weight=None, bias=None, eps=1e-5, activation=None, residual=None):
        seen.append((activation, residual is not None))
        return op(input, num_groups, weight, bias, eps, activation, residual)

    monkeypatch.setattr(MODULE, "group_norm", spy)
    return seen


def group_norms(channels, **_):
    return nn.GroupNorm(4, channels)


def flat(outputs):
    return tree_flatten(outputs)[0]


def values(model, *inputs):
    """Outputs, and gradients of parameters and inputs."""
    inputs = tree_map(lambda x: x.detach().clone().requires_grad_(), inputs)
    torch.manual_seed(3)
    outputs = flat(model(*inputs))
    loss = sum((y.square() * torch.linspace(0, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() for y in outputs)
    wanted = [p for p in (*flat(inputs), *model.parameters()) if p.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * float(y.detach().abs().max()))


def levels(channels=8):
    return [torch.randn(1, channels, size, size, dtype=torch.float64) for size in (8, 4)]


def images(channels=3, size=32):
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def detectron2_resnet(block):
    bottleneck = {"bottleneck_channels": 8} if block is BottleneckBlock else {}
    stages = [
        ResNet.make_stage(block, 2, stride_per_block=[s, 1], in_channels=i, out_channels=o, norm="GN4", **bottleneck)
        for s, i, o in ((1, 8, 16), (2, 16, 32))
    ]
    return ResNet(BasicStem(3, 8, norm="GN4"), stages, out_features=["res2", "res3"])


def fpn(**options):
    return FPN(detectron2_resnet(BasicBlock), ["res2", "res3"], 8, norm="GN4", **options)


def timm_model(name, **options):
    return pytest.importorskip("timm").create_model(name, norm_layer=group_norms, num_classes=5, **options)


def pool_of_p3():
    pool = LastLevelMaxPool()
    pool.in_feature = "p3"
    return pool


SHAPES = {"p2": ShapeSpec(channels=8, stride=4), "p3": ShapeSpec(channels=8, stride=8)}
TOWERS = {"input_shape": [ShapeSpec(channels=8)] * 2, "num_classes": 3, "conv_dims": [8] * 2, "norm": "GN4"}
RELU, ADDED, LAST = ("relu", False), (None, True), ("relu", True)
# what makes a model, its inputs, and the ops that it then runs
CASES = {
    "torchvision BasicBlock": (
        lambda: torchvision.models.resnet18(norm_layer=group_norms, num_classes=5),
        lambda: (images(),),
        [RELU, *[RELU, LAST] * 8],
    ),
    "torchvision Bottleneck": (
        lambda: torchvision.models.resnet.Bottleneck(16, 4, norm_layer=group_norms),
        lambda: (images(16),),
        [RELU, RELU, LAST],
    ),
    "Conv2dNormActivation": (
        lambda: Conv2dNormActivation(3, 8, norm_layer=group_norms, activation_layer=nn.SiLU),
        lambda: (images(),),
        [("silu", False)],
    ),
    "timm BasicBlock": (lambda: timm_model("resnet18"), lambda: (images(),), [RELU, *[RELU, LAST] * 8]),
    "timm Bottleneck": (lambda: timm_model("resnet26"), lambda: (images(),), [RELU, *[RELU, RELU, LAST] * 8]),
    "timm deep stem, squeeze-excite": (
        lambda: timm_model("seresnext26d_32x4d", drop_path_rate=0.3),
        lambda: (images(),),
        [RELU] * 3 + [RELU] * 16,
    ),
    "Detectron2 BasicBlock": (
        lambda: detectron2_resnet(BasicBlock),
        lambda: (images(),),
        [RELU, *[RELU, LAST] * 4],
    ),
    "Detectron2 BottleneckBlock": (
        lambda: detectron2_resnet(BottleneckBlock),
        lambda: (images(),),
        [RELU, *[RELU, RELU, LAST] * 4],
    ),
    "FPN": (
        lambda: fpn(top_block=pool_of_p3()),
        lambda: (images(),),
        [RELU, *[RELU, LAST] * 4, ADDED],
    ),
    "FPN of averages": (
        lambda: fpn(fuse_type="avg", top_block=LastLevelP6P7(32, 8, "res3")),
        lambda: (images(),),
        [RELU, *[RELU, LAST] * 4, ADDED],
    ),
    "RetinaNet": (lambda: RetinaNetHead(num_anchors=1, **TOWERS), lambda: (levels(),), [RELU] * 8),
    "FCOS": (lambda: FCOSHead(**TOWERS), lambda: (levels(),), [RELU] * 8),
    "box": (
        lambda: FastRCNNConvFCHead(
            ShapeSpec(channels=8, height=4, width=4), conv_dims=[8] * 2, fc_dims=[8], conv_norm="GN4"
        ),
        lambda: (images(8, 4),),
        [RELU] * 2,
    ),
    "a convolution that is standardized": (
        lambda: Conv2d(3, 8, 3, norm=get_norm("PGN+WS", 8), activation=F.silu),
        lambda: (images(),),
        [("silu", False)],
    ),
    "Sequential": (
        lambda: nn.Sequential(
            *(Conv2d(3, 8, 3, norm=GroupNorm(2, 8)), nn.Identity(), nn.ReLU(True), nn.Conv2d(8, 8, 1)),
            *(
                nn.GroupNorm(2, 8, affine=False),
                nn.GELU(),
                nn.GroupNorm(2, 8),
                nn.ReLU6(),
                nn.InstanceNorm2d(8),
                nn.ReLU(),
            ),
        ),
        lambda: (images(),),
        [RELU],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_same(case, ops):
    make, inputs, expected_ops = CASES[case]
    model, inputs = make().double().train(), inputs()
    for name, p in model.named_parameters():  # also of norms that are made with zeros
        nn.init.normal_(p, 1.0 if "norm" in name or "bn" in name else 0.0, 0.3)
    expected, state = values(model, *inputs), list(model.state_dict())
    assert fuse_norms(model) is model and list(model.state_dict()) == state
    assert_close(values(model, *inputs), expected)
    assert ops == expected_ops
    with torch.no_grad():
        assert_close(flat(model.eval()(*inputs)), flat(fuse_norms(model, enable=False)(*inputs)))
    assert len(ops) == 2 * len(expected_ops)
    assert not any(has(module, MODULE._Fused) for module in model.modules())


def random_module(rng):
    """One that can be fused, and the shape of its input."""
    groups, channels = rng.choice([1, 2, 4]), rng.choice([4, 8, 12])
    norm = f"GN{groups}" if rng.random() < 0.5 else f"GN{groups}+WS"
    makers = [
        lambda: BasicBlock(channels, rng.choice([channels, 16]), norm=norm),
        lambda: BottleneckBlock(channels, 16, bottleneck_channels=8, norm=norm, stride=rng.choice([1, 2])),
        lambda: Conv2d(channels, 8, 3, padding=1, norm=get_norm(norm, 8), activation=F.silu),
        lambda: torchvision.models.resnet.BasicBlock(channels, channels, norm_layer=partial(nn.GroupNorm, groups)),
        lambda: nn.Sequential(nn.GroupNorm(groups, channels, affine=rng.random() < 0.5), nn.ReLU()),
    ]
    return rng.choice(makers)().train(), (rng.choice([1, 3]), channels, rng.randint(3, 12), rng.randint(3, 12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, HALF])
@pytest.mark.parametrize("seed", range(8))
def test_random_modules_shapes_and_layouts(seed, dtype, ops, monkeypatch):
    """Against float64 without fusion: in other types no less accurate than without, with our kernels."""
    monkeypatch.setattr(group_norm_cpu, "is_faster", lambda x, *_: x.is_contiguous())
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, shape = random_module(rng)
    x = torch.randn(shape).to(memory_format=rng.choice([torch.contiguous_format, torch.channels_last]))
    x, model = x.to(dtype), model.to(dtype)
    exact = values(copy.deepcopy(model).double(), x.double())
    separate, fused = values(model, x), values(fuse_norms(model), x)
    assert ops

    def error(found):
        return max(((y - e).norm() / e.norm()).item() for y, e in zip(found, exact, strict=True))

    assert [y.dtype for y in fused] == [y.dtype for y in separate]
    assert error(fused) <= (1e-6 if dtype == torch.float64 else 2 * error(separate) + 1e-6)


@pytest.mark.parametrize("head", ["mask", "semantic"])
def test_heads_that_compute_losses(head, ops):
    if head == "mask":
        model = MaskRCNNConvUpsampleHead(ShapeSpec(channels=8), num_classes=3, conv_dims=[8] * 3, conv_norm="GN4")
        inputs, count = images(8, 8), 2
    else:
        model = SemSegFPNHead(SHAPES, num_classes=3, conv_dims=8, common_stride=4, norm="GN4")
        inputs, count = dict(zip(SHAPES, levels())), 2
    expected = model.double().layers(inputs)
    assert_close([fuse_norms(model).layers(inputs)], [expected])
    assert ops == [RELU] * count


# hooks, checks and looks


def hooked_block():
    torch.manual_seed(0)
    return BasicBlock(8, 8, norm="GN4").double()


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name, still_fused", [("conv1", 1), ("conv1.norm", 1), ("conv2.norm", 1), ("", 2)])
def test_hooks_that_are_added_later_see_what_they_saw(kind, name, still_fused, ops):
    x, seen = images(8, 8).requires_grad_(), []
    for block in (hooked_block(), fuse_norms(hooked_block())):
        hook = getattr(block.get_submodule(name), kind)(lambda module, *seen_: seen.append(flat(seen_)))
        block(x).sum().backward()
        hook.remove()
        ops.append(len(ops))
    assert ops[1:-1] == ops[1 : 1 + still_fused] and len(ops) == 2 + still_fused
    assert_close(*seen)
    block(x)
    assert ops[-2:] == [RELU, LAST]


def test_an_activation_and_all_modules_may_have_hooks(ops):
    model, calls = fuse_norms(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(2, 4), nn.ReLU())), []
    x = torch.randn(1, 4, 5, 5)
    hook = model[1].register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1] and ops == [RELU]
    hook.remove()
    hook = model[0].register_full_backward_hook(lambda *_: calls.append(1))
    model(x.requires_grad_()).sum().backward()
    assert calls == [1, 1] and ops == [RELU] * 2
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    model(x)
    hook.remove()
    assert len(calls) == 2 + 5 and ops == [RELU] * 2
    model[2].forward = lambda x: x  # as some libraries do
    model(x)
    assert ops == [RELU] * 3


@LOOK
def test_checks_looks_and_binding_are_as_before():
    model = fuse_norms(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1)), PracticalGroupNorm(8), nn.ReLU()))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), pytest.raises(InputError, match="never met a weight layer"):
        model(x)
    bind_norms(model, x)
    assert model[1].weight_layer == "Conv2d(3, 8)"
    with pytest.raises(InputError, match="it takes inputs"):
        model[1:](torch.randn(2, 4, 4, 4))
    wrong = fuse_norms(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), PracticalGroupNorm(8), nn.ReLU()))
    wrong[1] = nn.Sequential(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 8, 1))
    with pytest.raises(InputError, match="its input is made by"):
        wrong.train()(x)


def test_a_norm_that_is_replaced_later_runs_as_it_is(ops):
    block, x = fuse_norms(hooked_block()), images(8, 8)
    block.conv1.norm, block.conv2 = nn.BatchNorm2d(8).double(), nn.Conv2d(8, 8, 3, padding=1).double()
    expected = F.relu(block.conv2(F.relu(block.conv1(x))) + x)
    assert_close([block(x)], [expected])
    assert ops == []


# which modules


class Other(torchvision.models.resnet.BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_is_not_fused_is_listed(caplog, ops):
    same = type("Same", (torchvision.models.resnet.BasicBlock,), {})
    model = nn.ModuleDict({"other": Other(8, 8, norm_layer=group_norms), "same": same(8, 8, norm_layer=group_norms)})
    with caplog.at_level("INFO"):
        fuse_norms(model)
    assert "fused: 2 of 4 group norms, in same (Same); not fused" in caplog.text and "other (Other)" in caplog.text
    model["other"](torch.randn(1, 8, 4, 4))
    assert ops == []


def test_a_forward_of_another_version_is_not_known(monkeypatch):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    forward.__qualname__, forward.__module__ = "BasicBlock.forward", "torchvision.models.resnet"
    another = type("BasicBlock", (torchvision.models.resnet.BasicBlock,), {"forward": forward})
    with pytest.raises(InputError, match="BasicBlock has no group norm that an activation or a shortcut follows"):
        fuse_norms(another(8, 8, norm_layer=group_norms))


@pytest.mark.parametrize(
    "model",
    [torchvision.models.resnet18(), nn.Sequential(nn.GroupNorm(2, 4), nn.GELU()), nn.GroupNorm(2, 4)],
    ids=["BN", "GELU", "a norm alone"],
)
def test_a_model_in_which_nothing_is_fused_is_an_error(model):
    before = [type(m) for m in model.modules()]
    with pytest.raises(InputError, match=f"fuse_norms: {type(model).__name__} has no group norm that"):
        fuse_norms(model)
    assert [type(m) for m in model.modules()] == before


# what jobs do


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_fused_and_computes_with_its_own_weights(copied, ops):
    model, x = fuse_norms(detectron2_resnet(BasicBlock)), images().float()
    expected = flat(model(x))
    again = copied(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(map(torch.equal, flat(again(x)), expected)) and len(ops) == 18


def small_detector_part():
    """A model with standardized weights, shortcuts and a pyramid, and an input of it."""
    torch.manual_seed(2)
    stage = ResNet.make_stage(BottleneckBlock, 2, in_channels=8, out_channels=32, bottleneck_channels=8, norm="PGN+WS")
    stem = BasicStem(3, 8, norm="PGN+WS")
    return FPN(ResNet(stem, [stage], out_features=["res2"]), ["res2"], 8, norm="PGN+WS").train(), images().float()


def assert_near(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.detach().abs().max()))


def test_folded_plain_and_averaged_models_compute_the_same(ops, monkeypatch):
    """With our kernels, which so small a model would not get."""
    monkeypatch.setattr(group_norm_cpu, "is_faster", lambda x, *_: x.is_contiguous())
    model, x = small_detector_part()
    expected = flat(model(x))
    fuse_norms(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert_near(flat(average(x)), expected, 1e-5)
    count = len(ops)
    folded = fold_weight_standardization(copy.deepcopy(model))
    assert_near(flat(folded(x)), expected, 1e-5)
    assert len(ops) == 2 * count > 0
    plain = to_plain(model)
    assert_near(flat(plain(x)), expected, 1e-5)
    assert len(ops) == 2 * count and not any(has(module, MODULE._Fused) for module in plain.modules())


def test_mixed_precision(ops):
    model, x = small_detector_part()
    with torch.autocast("cpu", torch.bfloat16):
        expected = values(model, x)
        found = values(fuse_norms(model), x)
    assert ops
    assert_near(found, expected, 0.05)


@COMPILE
@pytest.mark.filterwarnings("ignore")
def test_compiled_gradients_are_the_same(ops):
    model, x = fuse_norms(hooked_block()), images(8, 8)
    expected, count = values(model, x), len(ops)
    torch._dynamo.reset()
    assert_close(values(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected)
    assert len(ops) == count > 0


@EXPORT
@pytest.mark.filterwarnings("ignore")
def test_an_exported_model_has_pytorchs_own_ops():
    model, x = small_detector_part()
    model = fuse_norms(model).eval()
    program = torch.export.export(model, (x,))
    assert_near(flat(program.module()(x)), flat(model(x)), 1e-5)
    assert not [node for node in program.graph.nodes if str(node.target).startswith("gng_d2")]


WAYS = {
    "fused": (fuse_norms, lambda model: fuse_norms(model, enable=False)),
    "recomputed": (recompute_norms, lambda model: recompute_norms(model, enable=False)),
    "standardized": (lambda m: standardize(m[0], "PGN+WS"), lambda m: unstandardize(m[0])),
}


@RECOMPUTE
@pytest.mark.parametrize("on", permutations(WAYS))
def test_with_recomputed_norms_and_standardized_weights_in_any_order(on, ops):
    x = images()
    for off in permutations(WAYS):
        model = nn.Sequential(Conv2d(3, 8, 3, norm=GroupNorm(2, 8)), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8))
        model = model.double().train()
        plain = values(model, x)
        standardize(model[0], "PGN+WS")
        standardized = values(model, x)
        unstandardize(model[0])
        for ways, which in ((on, 0), (off, 1)):
            for number, way in enumerate(ways, 1):
                WAYS[way][which](model)
                has_ws = ("standardized" in ways[:number]) == (which == 0)
                assert_close(values(model, x), standardized if has_ws else plain)
        assert [type(m) for m in model] == [Conv2d, nn.ReLU, nn.Conv2d, nn.GroupNorm] and type(model) is nn.Sequential
    assert ops


@RECOMPUTE
def test_laterals_that_are_recomputed_stay_so(ops):
    """The pyramid does not run their norms itself then."""
    model, x = fpn().double().train(), images()
    expected = values(model, x)
    recompute_norms(fuse_norms(model))
    assert_close(values(model, x), expected)
    assert ADDED not in ops and LAST in ops


def losses_of_training(model, batches, loss):
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(loss(model, batch))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


@pytest.mark.slow
def test_a_converted_model_trains_to_the_same_losses(ops):
    torch.manual_seed(1)
    model, batches = torchvision.models.resnet18(num_classes=4), [images(3, 48).float() for _ in range(6)]
    model = convert_norms(model, "PGN+WS", batches[0]).train()
    other = fuse_norms(copy.deepcopy(model))

    def loss(model, batch):
        return F.cross_entropy(model(batch), torch.tensor([0, 3]))

    expected = losses_of_training(model, batches, loss)
    assert not ops and expected[-1] < expected[0]
    torch.testing.assert_close(losses_of_training(other, batches, loss), expected, rtol=1e-3, atol=1e-4)
    assert len(ops) == 17 * len(batches)


def detector_batch():
    instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 48]])), gt_classes=torch.tensor([1]))
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 8:48, 8:40] = True
    instances.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    semantic = torch.randint(0, 4, (64, 64))
    return [{"image": image, "instances": instances, "sem_seg": semantic, "height": 64, "width": 64}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pfpn_pgn", "faster_rcnn_pgn_ws"])
def test_a_detector_trains_to_the_same_losses(name, ops):
    cfg = load_config(f"configs/quick/{name}.yaml", ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    model, batches = build_model(cfg).train(), [detector_batch() for _ in range(3)]
    other = fuse_norms(copy.deepcopy(model))

    def loss(model, batch):
        torch.manual_seed(7)
        with EventStorage():
            return sum(model(batch).values())

    expected = losses_of_training(model, batches, loss)
    assert not ops
    torch.testing.assert_close(losses_of_training(other, batches, loss), expected, rtol=1e-3, atol=1e-4)
    assert ops


@COMPILE
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_traced_or_compiled_runs_the_forward_of_its_own(ops):
    model, x = fuse_norms(torchvision.models.resnet18(norm_layer=group_norms)).eval(), images().float()
    expected = model(x)
    count = len(ops)
    torch._dynamo.reset()
    ways = {
        "compile": lambda: torch.compile(model, backend="eager", fullgraph=True)(x),
        "trace": lambda: torch.jit.trace(model, x, check_trace=False)(x),
        "script": lambda: torch.jit.script(model)(x),
        "symbolic": lambda: torch.fx.symbolic_trace(model)(x),
    }
    for run in ways.values():
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
    assert len(ops) == count > 0


@PARAMETRIZED_WEIGHT_NORM
def test_a_weight_that_is_parametrized_later(ops):
    """PyTorch puts a subclass on top of the fused class."""
    conv = Conv2d(8, 8, 3, padding=1, bias=False, norm=get_norm("PGN+WS", 8), activation=F.relu)
    x = torch.randn(2, 8, 6, 6)
    expected = conv(x)
    parametrizations.weight_norm(fuse_norms(conv), dim=None)  # a scale of all weights, of which the norm knows nothing
    torch.testing.assert_close(conv(x), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="how it runs cannot be changed"):
        fuse_norms(conv, enable=False)


def test_a_shortcut_in_float32_leaves_the_block_in_autocasts_type():
    block = convert_norms(torchvision.models.resnet.BasicBlock(16, 16), "GN/4", torch.randn(2, 16, 8, 8))
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plain, fused = block(x), fuse_norms(block)(x)
    assert plain.dtype == fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused, plain, atol=0.1, rtol=0.05)
