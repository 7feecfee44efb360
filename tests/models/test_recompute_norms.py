"""Norms computed again in the backward pass: the same bits as without, in less memory, in all that a job does."""

import copy
import glob
import io
import itertools
import pickle
from functools import partial

import pytest
import ready_process
import torch
import torchvision
from chains import chain, images
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
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils import checkpoint as torch_checkpoint
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
from gng_d2.ops import group_norm_cpu
from study.comparison import Comparison

pytestmark = [pytest.mark.slow, RECOMPUTE]

OPS = "statistics", "apply"
SCRATCH = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


def short_chain(channels):
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(model, *inputs):
    """Of the mean square of the outputs; the random stream after it, too."""
    model.zero_grad()
    torch.manual_seed(5)
    outputs = model(*inputs)
    outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
    sum(y.float().square().mean() for y in outputs).backward()
    return {**gradients_of(model), "": torch.rand(1)}


def losses_and_gradients(detector, *inputs, context=EventStorage):
    detector.zero_grad()
    torch.manual_seed(5)
    with context():
        losses = detector(*inputs)
    sum(losses.values()).backward()
    return {**gradients_of(detector), **{name: loss.detach() for name, loss in losses.items()}}


def assert_same(found, expected):
    assert found.keys() == expected.keys() and len(found) > 1
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def assert_same_gradients(model, inputs, runs=1):
    """With norms computed again and without. The first run is watched, and the second keeps what it can."""
    expected = gradients(model, inputs)
    recompute_norms(model)
    for _ in range(runs):
        assert_same(gradients(model, inputs), expected)


# bits


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
    expected = losses_and_gradients(model, batch)
    keys = list(model.state_dict())
    recompute_norms(model)
    assert list(model.state_dict()) == keys
    assert_same(losses_and_gradients(model, batch), expected)


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
    assert_same_gradients(model, images(1, 32), runs=2)
    assert len(recomputed_modules(model)) == modules


@pytest.mark.parametrize(
    "name, options, modules",
    [
        ("resnet50_gn", {}, 16),
        ("seresnet50", {"norm_layer": lambda c, **_: nn.GroupNorm(4, c), "drop_path_rate": 0.3, "drop_rate": 0.3}, 16),
        ("resnetv2_50x1_bit", {}, 16),
        ("convnext_atto", {"drop_path_rate": 0.3}, 16),
    ],
)
def test_timm(name, options, modules):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, **options).train()
    assert_same_gradients(model, images(1, 32), runs=2)
    assert len(recomputed_modules(model)) == modules


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
    assert_same_gradients(chain(nn.Dropout(0.4), nn.Conv2d(128, 8, 3), GroupNorm(2, 8), nn.Dropout2d(0.4)), images())


# what is kept


def test_a_convolution_without_norm_may_be_changed_in_place():
    """As in squeeze-excite blocks. It cannot be kept, and then is not; the random stream is the same, too."""
    layers = nn.Conv2d(3, 128, 3), nn.Dropout(0.5), nn.Conv2d(128, 128, 3), nn.SiLU(inplace=True), *chain()[1:]
    assert_same_gradients(nn.Sequential(*layers), images(), runs=2)


class OverMaps(nn.Sequential):
    """Runs its layers over each of several feature maps, as a head does."""

    def forward(self, maps):
        return torch.stack([super(OverMaps, self).forward(x).mean() for x in maps])


@pytest.mark.parametrize("threads", [1, 2])  # which of our kernels run depends on the size and the threads
@pytest.mark.parametrize("runs", [[[16], [80], [16]], [[80], [16]], [[16], [16, 16, 16]], [[16, 32], [80]]])
def test_images_of_another_size_and_other_numbers_of_maps(runs, threads, set_threads):
    layers = nn.Conv2d(96, 96, 3), nn.ReLU(inplace=True), nn.Conv2d(96, 96, 3), nn.Hardswish(inplace=True)
    model = OverMaps(GroupNorm(1, 96), *layers, nn.Conv2d(96, 96, 3))
    plain = copy.deepcopy(model)
    recompute_norms(model)
    set_threads(threads)
    for sizes in runs:
        torch.manual_seed(0)
        maps = [torch.randn(1, 96, size, size) for size in sizes]
        for m in (plain, model):
            m.zero_grad()
            m(maps).square().sum().backward()
        assert_same(gradients_of(model), gradients_of(plain))


def convolutions_run(model, x):
    """How many, in the forward and the backward pass."""
    with Recorder() as recorder:
        model(x).square().sum().backward()
    return recorder.ops.count("aten.convolution.default")


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
        runs.append(convolutions_run(model, x))
        plain(x).square().sum().backward()
    assert_same(gradients_of(model), gradients_of(plain))
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
    assert_same(gradients_of(block), gradients_of(plain))


def test_an_expensive_convolution_is_kept_from_the_second_run_on():
    model = nn.Sequential(GroupNorm(2, 96), nn.Conv2d(96, 96, 3), nn.SiLU(), nn.Conv2d(96, 8, 1))
    recompute_norms(model)
    runs = [convolutions_run(model, torch.randn(1, 96, size, size)) for size in (16, 16, 32)]
    assert runs == [4, 3, 3]  # the 1 x 1 one is cheap, and computed again each time


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
    model = nn.Sequential(*(Conv2d(256, 256, 3, padding=1, bias=False, norm=get_norm("PGN+WS", 256)) for _ in range(2)))
    inputs, weight = torch.randn(1, 256, 4, 4), 256 * 256 * 9 * 4
    assert bytes_left(lambda: model(inputs))[1] > 2 * weight
    assert bytes_left(lambda: recompute_norms(model)(inputs))[1] < weight / 10


def test_a_graph_that_is_dropped_leaves_nothing():
    model, inputs = recompute_norms(chain()), images()
    model(inputs).sum().backward()
    assert bytes_left(lambda: model(inputs))[1] > 2**18
    assert bytes_left(lambda: model(inputs) is None)[1] < 2**15


def test_no_tensor_is_held_to_compare_outputs():
    model, inputs = recompute_norms(chain()), images()
    model(inputs).sum().backward()
    sizes = [bytes_left(lambda: model(inputs))[1] for _ in range(4)]
    assert model._kept.runs == 5 and len(set(sizes)) == 1  # the last runs are not compared


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


def test_a_graph_module_is_an_error():
    graph = torch.fx.symbolic_trace(short_chain(3))
    with pytest.raises(InputError, match="a torch.fx GraphModule runs all of its ops at once"):
        recompute_norms(graph)


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


def test_a_forward_of_the_instance_is_not_taken():
    model = nn.ModuleDict({"patched": chain(), "other": chain()})
    model["patched"].forward = nn.Sequential(*model["patched"]).forward
    assert recomputed_modules(recompute_norms(model)) == ["other"]


@PARAMETRIZED_WEIGHT_NORM
def test_below_a_subclass_of_pytorch_it_is_still_named():
    model = recompute_norms(nn.ModuleDict({"a": chain()}))
    model["a"].register_buffer("steps", torch.zeros(()))
    parametrize.register_parametrization(model["a"], "steps", nn.Identity())
    assert recomputed_modules(model) == ["a"]
    with pytest.raises(InputError, match="how it runs cannot be changed"):
        recompute_norms(model, enable=False)


def test_it_is_undone():
    model = nn.Sequential(chain(), nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(True), *short_chain(128)))
    gradients(model, images())
    before = [(type(m), set(vars(m))) for m in model.modules()]
    gradients(recompute_norms(recompute_norms(model)), images())  # twice is as once
    assert recomputed_modules(model) == ["0", "1"]
    assert recompute_norms(model, enable=False) is model
    assert [(type(m), set(vars(m))) for m in model.modules()] == before


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
    torch.testing.assert_close([*gradients(compiled, inputs).values()], [*expected.values()])


def test_compiled_layer_inside_a_block():
    torch._dynamo.reset()
    model, inputs = chain(), images()
    expected = gradients(model, inputs)
    model[3].compile(backend="aot_eager")
    assert_same(gradients(recompute_norms(model), inputs), expected)


def test_symbolic_trace_and_script():
    model = recompute_norms(short_chain(3)).eval()
    inputs = images()
    for of in (torch.fx.symbolic_trace, torch.jit.script):
        assert torch.equal(of(model)(inputs), model(inputs))


# mixed precision


def test_mixed_precision_has_the_same_gradients():
    model, inputs = chain(), images()
    with BFLOAT16():
        assert_same_gradients(model, inputs)


def test_mixed_precision_with_a_module_that_runs_on_five_levels():
    """Autocast casts its weights for the first level, and not for the others; so each is computed again."""
    tower = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), GroupNorm(8, 128), nn.ReLU())
    levels = [torch.randn(1, 128, size, size) for size in (16, 12, 8, 6, 4)]

    def run(whole):
        with BFLOAT16():
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
    image = torch.rand(3, 64, 64)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]
    convert_norms(model, "PGN", [image])
    expected = losses_and_gradients(model, [image], targets, context=BFLOAT16)
    recompute_norms(model)
    found = losses_and_gradients(model, [image], targets, context=BFLOAT16)
    for values in (found, expected):  # PyTorch's convolution of a single pixel has other bits each time
        del values["backbone.fpn.extra_blocks.p7.weight"]
    assert_same(found, expected)


def test_autocast_of_its_own_inside_one_that_is_off():
    """The casts of weights live as long as the outer one, so a second run finds those of the first."""

    class Own(nn.Sequential):
        def forward(self, x):
            with BFLOAT16():
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


# what jobs do


def test_accumulated_gradients_and_two_passes_in_one_graph():
    model, first, second = chain(), images(), images()

    def accumulated():
        model.zero_grad()
        for inputs in (first, second):
            model(inputs).square().mean().backward()
        (model(first) * model(second)).mean().backward()
        return gradients_of(model)

    expected = accumulated()
    recompute_norms(model)
    assert_same(accumulated(), expected)


@pytest.mark.parametrize("frozen", [[0], [0, 1], [1, 3], [3, 4]])
def test_frozen_layers(frozen):
    model, inputs = chain(), images()
    for index in frozen:
        model[index].requires_grad_(False)
    assert_same_gradients(model, inputs)


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
    for _ in range(2):
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


def test_a_slice_of_a_block():
    model, x = chain(), images()
    expected = gradients(copy.deepcopy(model)[:4], x)
    assert_same(gradients(recompute_norms(model)[:4], x), expected)


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


def test_replicas_of_data_parallel_count_as_one():
    model = recompute_norms(chain())
    for _ in range(4):
        replica = model._replicate_for_data_parallel()
        replica._parameters = dict(model._parameters)
        replica(images())
    assert model._kept.runs == 4


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
