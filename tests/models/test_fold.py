"""Folded outputs equal unfolded ones, or folding refuses by name and leaves the model as it was."""

import copy
import io

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from needs import HALF, PARAMETRIZED_WEIGHT_NORM, needs_torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from gng_d2 import WSConv2d, fold_weight_standardization
from gng_d2.errors import InputError
from gng_d2.job.config import load_config
from gng_d2.ops import standardize_weight

X = torch.linspace(-3, 5, 2 * 6 * 7 * 7).view(2, 6, 7, 7).sin()


def detectron2_conv(**kwargs):
    return Conv2d(6, 4, 3, padding=1, norm=get_norm("PGN+WS", 4), activation=F.relu, **kwargs)


def pytorch_conv(**kwargs):
    return nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, **kwargs), get_norm("PGN+WS", 4))


def own_conv(**kwargs):
    return WSConv2d(6, 4, 3, padding=1, **kwargs)


def assert_folds(model, *outputs):
    """``outputs``: what to compare, functions of nothing."""
    outputs = outputs or (lambda: model(X),)
    before = [output() for output in outputs]
    assert fold_weight_standardization(model) is model
    assert not any(isinstance(m, WSConv2d) for m in model.modules())
    for output, expected in zip(outputs, before):
        torch.testing.assert_close(output(), expected)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("make", [detectron2_conv, pytorch_conv, own_conv])
def test_every_padding(make, padding_mode):
    assert_folds(make(padding_mode=padding_mode))


@pytest.mark.parametrize("kwargs", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"bias": False}])
@pytest.mark.parametrize("make", [detectron2_conv, pytorch_conv, own_conv])
def test_every_convolution(make, kwargs):
    assert_folds(make(**kwargs))


CIRCULAR = pytest.param("circular", marks=needs_torch(2, 4, "circular padding of an image that is in no batch"))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", CIRCULAR])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("layer", [nn.Conv2d, Conv2d])
def test_a_standardized_layer_pads_as_it_did(layer, padding, padding_mode):
    conv = layer(6, 4, 3, padding=padding, padding_mode=padding_mode)
    plain = copy.deepcopy(conv)
    plain.weight.data = standardize_weight(conv.weight).detach()
    block = nn.Sequential(conv, get_norm("GN1+WS", 4))
    assert type(conv) is WSConv2d
    torch.testing.assert_close(conv(X), plain(X))
    torch.testing.assert_close(conv(X[:0]), plain(X[:0]))
    torch.testing.assert_close(conv(X[0]), plain(X[0]))
    assert_folds(block)
    torch.testing.assert_close(conv(X), plain(X))


def test_no_convolution_of_pytorch_applies_a_norm_that_is_its_child():
    conv = nn.Conv2d(6, 4, 3)
    conv.norm = get_norm("GN1+WS", 4)
    expected = F.conv2d(X, standardize_weight(conv.weight), conv.bias)
    torch.testing.assert_close(conv(X), expected)
    assert_folds(conv, lambda: conv(X), lambda: conv.norm(conv(X)))
    assert type(conv) is nn.Conv2d and "applies_norm" not in vars(conv)


def test_an_empty_batch_passes_as_in_detectron2():
    conv = detectron2_conv()
    assert conv(X[:0]).shape == (0, 4, 7, 7)
    assert_folds(conv, lambda: conv(X[:0]))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Other(WSConv2d):
    def forward(self, x):
        return -super().forward(x)


def replaced_forward(layer):
    """As accelerate's hooks."""
    forward = layer.forward
    layer.forward = lambda x: forward(x)


def to_buffer(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)


OBSTACLES = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": weight_norm,
    "spectral_norm": lambda layer: spectral_norm(layer).eval(),
    "parametrized weight_norm": lambda layer: weight_norm_of(layer),
    "parametrized spectral_norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "buffer": to_buffer,
    "forward": replaced_forward,
    "_conv_forward": lambda layer: setattr(layer, "_conv_forward", layer._conv_forward),
    "subclass": lambda layer: setattr(layer, "__class__", Other),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "obstacle",
    [
        pytest.param(f, id=name, marks=PARAMETRIZED_WEIGHT_NORM if name == "parametrized weight_norm" else ())
        for name, f in OBSTACLES.items()
    ],
)
@pytest.mark.parametrize("make", [detectron2_conv, own_conv])
def test_refuses_by_name_what_it_cannot_fold(make, obstacle):
    model = nn.ModuleDict({"stem": own_conv(), "head": nn.Sequential(nn.Identity(), make())})
    obstacle(model["head"][1])
    before = [model["stem"](X), model["head"](X)]
    with pytest.raises(InputError, match=r"^head\.1: its weight standardization cannot be folded"):
        fold_weight_standardization(model)
    for layer, expected in zip(model.values(), before):
        assert torch.equal(layer(X), expected)
    assert "weight_standardization=True" in repr(model) or make is own_conv


@PARAMETRIZED_WEIGHT_NORM
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_folds_what_is_undone():
    model = nn.Sequential(prune.l1_unstructured(own_conv(), "weight", 0.5))
    prune.remove(model[0], "weight")
    assert_folds(model)
    model = nn.Sequential(parametrizations.weight_norm(own_conv()))
    parametrize.remove_parametrizations(model[0], "weight")
    assert_folds(model)
    model = nn.Sequential(prune.l1_unstructured(own_conv(), "bias", 0.5))
    assert_folds(model)


def test_refuses_the_only_layer_by_its_class_and_weights_that_are_not_there():
    with pytest.raises(InputError, match="^WSConv2d: .*meta device"):
        fold_weight_standardization(own_conv().to("meta"))


def test_refuses_a_padding_that_no_plain_layer_with_a_norm_has():
    with pytest.raises(InputError, match="^0: .*padding_mode 'reflect'"):
        fold_weight_standardization(nn.Sequential(own_conv(padding_mode="reflect", norm=nn.GroupNorm(1, 4))))
    with pytest.raises(InputError, match="^0: .*padding_mode 'reflect'"):
        fold_weight_standardization(nn.Sequential(own_conv(padding_mode="reflect", activation=F.relu)))


def test_whatever_else_holds_the_weight_keeps_it():
    model = nn.ModuleList([own_conv(), nn.Conv2d(6, 4, 3), own_conv(), own_conv()])
    outside = nn.Conv2d(6, 4, 3)
    flat = torch.randn(2 * 4 * 6 * 3 * 3)
    model[0].weight = model[1].weight = outside.weight
    model[2].weight, model[3].weight = (nn.Parameter(flat[: 4 * 6 * 9].view(4, 6, 3, 3)) for _ in range(2))  # a view
    assert_folds(model, *(lambda layer=layer: layer(X) for layer in (*model, outside)), lambda: flat)
    assert model[1].weight is outside.weight and model[0].weight is not outside.weight


def test_layers_that_share_a_weight_go_on_sharing_it():
    convs = nn.ModuleList(detectron2_conv() for _ in range(2))
    convs[0].weight.data *= 1e-4  # small: standardized twice would be something else
    convs[1].weight = convs[0].weight
    assert_folds(convs, *(lambda conv=conv: conv(X) for conv in convs))
    assert convs[0].weight is convs[1].weight and len(list(convs.parameters())) == 7


@pytest.mark.parametrize("scale", [1, 1e-2, 1e-4, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, HALF, torch.bfloat16])
def test_any_type_and_scale_also_twice(dtype, scale):
    conv = own_conv().to(dtype)
    conv.weight.data *= scale
    conv.weight.data[0] *= 1e-4
    assert_folds(conv, lambda: conv(X.to(dtype)))
    assert conv.weight.dtype == dtype
    assert_folds(conv, lambda: conv(X.to(dtype)))
    twin = copy.deepcopy(conv).bfloat16()
    assert_folds(twin, lambda: twin(X.bfloat16()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.load(_saved(model), weights_only=False)])
def test_copies(copied):
    model = detectron2_conv()
    first = copied(model)
    assert_folds(first)
    torch.testing.assert_close(first(X), model(X))
    assert type(model) is WSConv2d and model.norm.weight_standardization
    second = copied(first)
    assert_folds(second)
    torch.testing.assert_close(second(X), model(X))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_weights_loaded_after_folding_are_not_taken_for_folded_ones():
    model = nn.Sequential(nn.Identity(), detectron2_conv())
    raw = copy.deepcopy(model.state_dict())
    folded = copy.deepcopy(fold_weight_standardization(model).state_dict())
    for state in raw, {name: 10 * value for name, value in raw.items()}:
        model.load_state_dict(state)
        with pytest.raises(InputError, match=r"^1: .*its weight changed \(load_state_dict, training\)"):
            fold_weight_standardization(model)
    model.load_state_dict(folded)
    assert_folds(model)
    raw["1.weight"] -= raw["1.weight"].mean((1, 2, 3), keepdim=True)
    model.load_state_dict(raw)
    with pytest.raises(InputError, match="its weight changed"):
        fold_weight_standardization(model)


def test_parameters_keep_their_layout_and_whether_they_take_a_gradient():
    conv = own_conv().to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    assert_folds(conv)
    assert not conv.weight.requires_grad and conv.weight.is_contiguous(memory_format=torch.channels_last)
    conv = fold_weight_standardization(own_conv())
    assert conv.weight.requires_grad and isinstance(conv.weight, nn.Parameter) and conv.weight.is_leaf
    conv(X).square().sum().backward()
    assert conv.weight.grad.any()


def test_between_a_forward_and_its_backward_pass():
    conv, twin = own_conv(), own_conv()
    twin.load_state_dict(conv.state_dict())
    raw, loss = conv.weight, conv(X).square().sum()
    fold_weight_standardization(conv)
    loss.backward()
    twin(X).square().sum().backward()
    torch.testing.assert_close(raw.grad, twin.weight.grad)


def test_hooks_stay():
    conv, seen = own_conv(), []
    conv.register_forward_hook(lambda *args: seen.append(args))
    assert_folds(conv)
    assert len(seen) == 2


@needs_torch(2, 4, "nn.Module.compile")
def test_a_compiled_layer():
    conv = own_conv()
    conv.compile(backend="eager")
    assert_folds(conv)


def test_a_folded_layer_that_is_standardized_again():
    conv = fold_weight_standardization(detectron2_conv())
    conv.norm = get_norm("GN1+WS", 4)
    assert type(conv) is WSConv2d
    assert_folds(conv)


@PARAMETRIZED_WEIGHT_NORM
def test_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(detectron2_conv())
        with torch.no_grad():
            assert_folds(model)
        model = nn.parallel.DistributedDataParallel(weight_norm_of(own_conv()))
        with pytest.raises(InputError, match="^module: "):
            fold_weight_standardization(model)
    finally:
        torch.distributed.destroy_process_group()


def weight_norm_of(layer):
    return parametrizations.weight_norm(layer)


def test_a_folded_norm_says_so():
    for model in (detectron2_conv(), pytorch_conv()):
        norm = model.norm if isinstance(model, Conv2d) else model[1]
        assert norm.weight_standardization and not norm.weight_standardization_folded
        assert "WS" in norm.norm_name() and "weight_standardization" in repr(model)
        fold_weight_standardization(model)
        assert norm.weight_standardization_folded and not norm.weight_standardization
        assert norm.norm_name() == "PGN" and "WS" not in repr(model) and "weight_standardization" not in repr(model)


def test_a_norm_that_met_no_layer_stays_an_error():
    model = nn.Sequential(own_conv(), nn.ReLU(), get_norm("GN1+WS", 4))
    fold_weight_standardization(model)
    with pytest.raises(InputError, match="no weight to standardize"):
        model(X)


def test_a_model_without_standardized_layers_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(6, 4, 3), get_norm("PGN", 4))
    assert_folds(model)
    assert not model[1].weight_standardization_folded


@pytest.mark.slow
def test_a_backbone():
    cfg = load_config("configs/quick/faster_rcnn_pgn_ws.yaml")
    backbone = build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)).eval()
    images = torch.randn(1, 3, 64, 64)
    before = backbone(images)
    folded = fold_weight_standardization(backbone)
    assert not [m for m in folded.modules() if isinstance(m, WSConv2d)]
    for name, feature in folded(images).items():
        torch.testing.assert_close(feature, before[name], rtol=1e-4, atol=1e-4)


def test_a_model_folded_in_inference_mode_can_be_trained():
    model = own_conv()
    with torch.inference_mode():
        fold_weight_standardization(model)
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.load_state_dict(model.state_dict())
