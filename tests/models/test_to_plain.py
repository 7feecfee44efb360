"""Models of ours as what knows modules by their exact class wants them."""

import copy

import pytest
import timm
import torch
import torchvision
from detectron2.layers import Conv2d, get_norm
from needs import RECOMPUTE
from timm import layers as timm_layers
from torch import nn

import gng_d2
from gng_d2 import GroupNorm, PracticalGroupNorm, WSConv2d, convert_norms, recompute_norms, to_plain
from gng_d2.errors import InputError

X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def detectron2s():
    return nn.Sequential(
        Conv2d(3, 64, 3, norm=get_norm("GN", 64), activation=nn.functional.relu),
        Conv2d(64, 32, 1, norm=get_norm("PGN+WS", 32)),
        Conv2d(32, 32, 1, norm=get_norm("GN/16", 32)),
    )


def with_activations():
    layers = timm_layers.ConvNormAct(3, 16, 3, act_layer=nn.SiLU), timm_layers.ConvNormAct(16, 8, 1, apply_act=False)
    model = nn.Sequential(*layers, timm_layers.BatchNormAct2d(8, drop_layer=lambda: nn.Dropout(0.5)))
    return convert_norms(model, "PGN", X)


MODELS = {
    "Detectron2's layers": detectron2s,
    "timm's norms with activations": with_activations,
    "used by hand": lambda: nn.Sequential(WSConv2d(3, 16, 3, padding=1), PracticalGroupNorm(16), nn.ReLU()),
    "behind a pooling": lambda: convert_norms(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)), "PGN+WS", X
    ),
    "a norm alone": lambda: GroupNorm(1, 3),
    "without affine": lambda: nn.Sequential(GroupNorm(1, 3, affine=False)),
    "timm efficientnet": lambda: convert_norms(timm.create_model("test_efficientnet"), "PGN+WS", X),
}


def classes(model):
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_stay_and_no_class_is_ours(name):
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.uniform_(parameter)
    parameters, train = set(model.parameters()), model.training
    kept = {p for m in model.modules() if not isinstance(m, WSConv2d) for p in m.parameters(recurse=False)}
    right = copy.deepcopy(model).eval()(X)
    assert to_plain(model) is model and model.training == train
    assert not [cls for cls in classes(model) if any(base.__module__.startswith("gng_d2") for base in cls.__mro__)]
    ours = set(dir(PracticalGroupNorm(1))) - set(dir(nn.GroupNorm(1, 1)))
    norms = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.Sequential))]
    assert not any(vars(m).keys() & ours for m in norms)
    torch.testing.assert_close(model.eval()(X), right)
    assert kept <= set(model.parameters()) and len(parameters) == len(set(model.parameters()))
    assert str(to_plain(model)) == str(model)
    torch.testing.assert_close(copy.deepcopy(model)(X), right)


def test_what_holds_an_activation_is_a_sequence():
    model = to_plain(with_activations())
    assert [type(part) for part in model[0].bn] == [nn.GroupNorm, nn.SiLU]
    assert type(model[1].bn) is nn.GroupNorm
    assert [type(part) for part in model[2]] == [nn.GroupNorm, nn.Dropout, nn.ReLU]
    assert not model.eval()[2][0].training and model.train()[2][0].training
    assert list(model[0].bn.state_dict()) == ["0.weight", "0.bias"]


def test_a_norm_in_two_places_hooks_and_gradients_stay():
    norm, calls = PracticalGroupNorm(8), []
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 8, 1), norm)
    handle = norm.register_forward_hook(lambda *args: calls.append(1))
    to_plain(model)(X).sum().backward()
    assert model[1] is model[3] is norm and type(norm) is nn.GroupNorm and len(calls) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())
    handle.remove()
    model(X)
    assert len(calls) == 2


@RECOMPUTE
def test_nothing_is_recomputed():
    model = recompute_norms(with_activations())
    right = model.eval()(X)
    to_plain(model)
    assert not gng_d2.recomputed_modules(model) and torch.equal(model(X), right)
    assert not [cls for cls in classes(model) if cls.__module__.startswith("gng_d2") or "Recomputed" in cls.__name__]


class Doubled(GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


BAD = {
    "met no weight layer yet, .*bind_norms": lambda: PracticalGroupNorm(8),
    "is a Doubled, a subclass": lambda: Doubled(1, 3),
    "is a ParametrizedGroupNorm, a subclass": lambda: nn.utils.parametrize.register_parametrization(
        GroupNorm(1, 3), "weight", nn.Softplus()
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_plain_is_named_and_nothing_changes(message):
    model = nn.Sequential(GroupNorm(1, 3), nn.Identity(), nn.Sequential(BAD[message]()))
    before = str(model)
    with pytest.raises(InputError, match=f"to_plain: 2.0 .*{message}"):
        to_plain(model)
    assert str(model) == before


def test_weights_that_cannot_be_folded_change_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), GroupNorm(2, 8, weight_standardization=True))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(InputError, match="0: its weight standardization cannot be folded"):
        to_plain(model)
    assert type(model[1]) is GroupNorm


# opacus, torch-pruning and others register their rules so.
RULES = {nn.Conv2d: "convolution", nn.GroupNorm: "group norm", nn.SiLU: "element by element"}


def test_a_table_by_exact_class_knows_every_module():
    model = convert_norms(timm_layers.ConvNormAct(3, 16, 3, act_layer=nn.SiLU), "PGN+WS", X)
    assert {type(m) for m in model.modules() if list(m.parameters(recurse=False))}.isdisjoint(RULES)
    to_plain(model)
    assert [RULES.get(type(m)) for m in model.modules() if not list(m.children())] == list(RULES.values())


@pytest.mark.slow
def test_a_detectors_head_computes_the_same_bits_where_no_kernel_of_ours_runs():
    """In float32 rounding differs, and detections with nearly equal scores may change places."""
    ssd = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    images, outputs = [torch.rand(3, 320, 320, dtype=torch.float64)], []
    model = convert_norms(ssd.double().eval(), "PGN", images)
    model.head.register_forward_hook(lambda head, args, output: outputs.append(output))
    with torch.no_grad():
        model(images), to_plain(model)(images)
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in ("bbox_regression", "cls_logits"))
