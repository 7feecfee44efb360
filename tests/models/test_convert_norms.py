from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from detectron2.layers import Conv2d, CycleBatchNormList, NaiveSyncBatchNorm, ShapeSpec
from detectron2.layers import FrozenBatchNorm2d as Detectron2FrozenBatchNorm2d
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from needs import PARAMETRIZED_WEIGHT_NORM, needs_torch
from survey_timm import brute_force_groups, check, fed_by, is_norm, randomize
from timm import layers as timm_layers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import gng_d2
from gng_d2 import GroupNorm, PracticalGroupNorm, bind_norms, convert_norms, fuse_norms, norm_table
from gng_d2.errors import InputError

# whole models


def faster_rcnn():
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)  # with FrozenBatchNorm2d
    return FasterRCNN(backbone, num_classes=3, min_size=128, max_size=128, box_detections_per_img=5)


def targets():
    return [{"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}]


# (model, number of its norms of the kinds that are replaced)
MODELS = {
    "timm resnet50": (lambda: timm.create_model("resnet50"), 53),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), 49),
    "timm densenet121": (lambda: timm.create_model("densenet121"), 121),
    "timm convnext_tiny": (lambda: timm.create_model("convnext_tiny"), 0),
    "timm mobilenetv3_large_100": (lambda: timm.create_model("mobilenetv3_large_100"), 46),
    "timm regnety_008": (lambda: timm.create_model("regnety_008"), 47),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(), 53),
    "torchvision densenet121": (lambda: torchvision.models.densenet121(), 121),
    "torchvision fasterrcnn": (faster_rcnn, 20),
    "smp Unet": (lambda: smp.Unet("resnet18", encoder_weights=None), 30),
    "smp DeepLabV3Plus": (lambda: smp.DeepLabV3Plus("resnet50", encoder_weights=None), 62),
}


def replaceable(model):
    return [m for m in model.modules() if is_norm(m) and not isinstance(m, GroupNorm)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_group_is_that_of_the_layer_that_fed_the_norm(name, caplog):
    make, count = MODELS[name]
    model = make()
    randomize(model)
    images = torch.rand(2, 3, 96, 96)
    inputs = [images[0]] if name.endswith("rcnn") else images
    fed = fed_by(model, inputs)
    assert len(fed) == count, "norms that did not run"
    assert convert_norms(model, "PGN", (inputs,)) is model
    converted, alone, fewer, left, wrong = check(fed, model)
    assert not wrong and not left
    assert len(converted) + len(alone) + len(fewer) == count
    said = caplog.text
    assert all(f"{len(names)} " in said and names[0] in said for names in (alone, fewer) if names)
    assert bool(alone) == name.endswith("densenet121") and bool(fewer) == name.endswith("DeepLabV3Plus")

    if name.endswith("rcnn"):
        loss = sum(model.train()([images[0]], targets()).values())
    else:
        loss = model.train()(images).square().mean()
    loss.backward()
    norms = [m for m in model.modules() if isinstance(m, PracticalGroupNorm) and m.weight.requires_grad]
    assert torch.isfinite(loss) and all(torch.isfinite(m.weight.grad).all() for m in norms)
    frozen = 5 if name.endswith("rcnn") else 0  # by torchvision: the stem and the first stage
    assert len(norms) == len(converted) + len(alone) - frozen


@pytest.mark.parametrize("name", ["timm densenet121", "torchvision resnet50"])
def test_without_inputs_the_order_of_registration_tells(name, caplog):
    with torch.device("meta"):
        model = MODELS[name][0]()
    convert_norms(model)
    norms = {k: m for k, m in model.named_modules() if isinstance(m, PracticalGroupNorm)}
    unbound = [k for k, m in norms.items() if m.num_groups is None]
    assert len(norms) == MODELS[name][1]
    if name.endswith("densenet121"):
        assert len(unbound) == 62 and "62 " in caplog.text and unbound[0] in caplog.text
    else:
        assert not unbound and norms["layer1.0.bn1"].num_groups == 1 and norms["layer1.1.bn1"].num_groups == 64


def test_activations_inside_timm_norms_stay():
    with torch.device("meta"):
        model = timm.create_model("efficientnet_b0")
    names = {name: m for name, m in model.named_modules() if isinstance(m, nn.SiLU)}
    assert len(names) == 49
    convert_norms(model)
    assert {name: m for name, m in model.named_modules() if isinstance(m, nn.SiLU)} == names


def retinanet_head():
    shapes = [ShapeSpec(channels=128)] * 2
    return RetinaNetHead(input_shape=shapes, num_classes=3, num_anchors=1, conv_dims=[64], norm="BN")


def test_norms_that_take_turns():
    """Detectron2's RetinaNet has a batch norm for each level behind one convolution, and one affine for all."""
    head = retinanet_head()
    features = [torch.rand(1, 128, 8, 8), torch.rand(1, 128, 4, 4)]
    affines = [
        parameter
        for layer in head.modules()
        if isinstance(layer, CycleBatchNormList)
        for parameter in layer.parameters()
    ]
    for parameter in affines:
        nn.init.uniform_(parameter)
    convert_norms(head, "PGN", (features,))
    assert [norm.num_groups for norm in head.cls_subnet[1]] == [16, 16] and not replaceable(head)
    assert head(features)[0][1].shape == (1, 3, 4, 4)
    assert [parameter.unique().item() for parameter in affines] == [1, 0] * 2  # batch norm's says nothing to them


def test_an_affine_of_norms_that_take_turns_stays_where_one_of_them_stays():
    head = retinanet_head()
    nn.init.constant_(head.cls_subnet[1].weight, 2)
    convert_norms(head, "GN/1", ([torch.rand(1, 128, 8, 8), torch.rand(1, 128, 1, 1)],))
    assert [type(norm) for norm in head.cls_subnet[1]] == [GroupNorm, nn.BatchNorm2d]
    assert (head.cls_subnet[1].weight == 2).all()


# every kind of norm


def conv(dims):
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](64, 16, 1)


def timm_act(make, *args, **kwargs):
    norm = make(*args, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.5), **kwargs)
    randomize(norm)
    return norm


def without_bias():
    norm = nn.BatchNorm2d(16)
    norm.bias = None
    return norm


def without_eps():
    def forward(self, x):
        return FrozenBatchNorm2d.forward(SimpleNamespace(**self._buffers, eps=1e-5), x)

    norm = type("FrozenBatchNorm2d", (nn.Module,), {"forward": forward})()
    for name, tensor in FrozenBatchNorm2d(16).named_buffers():
        norm.register_buffer(name, tensor)
    return norm


KINDS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(16), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(16), 2),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(16), 3),
    "BatchNorm2d without affine": (lambda: nn.BatchNorm2d(16, affine=False), 2),
    "BatchNorm2d without bias": (without_bias, 2),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(16), 2),
    "NaiveSyncBatchNorm": (lambda: NaiveSyncBatchNorm(16), 2),
    "torchvision's FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(16), 2),
    "Detectron2's FrozenBatchNorm2d": (lambda: Detectron2FrozenBatchNorm2d(16), 2),
    "DETR's FrozenBatchNorm2d": (without_eps, 2),
    "GroupNorm": (lambda: nn.GroupNorm(2, 16), 2),
    "timm's GroupNorm": (lambda: timm_layers.GroupNorm(16, 2), 2),
    "timm's GroupNorm1": (lambda: timm_layers.GroupNorm1(16), 2),
    "our GroupNorm": (lambda: GroupNorm(2, 16), 2),
    "our PracticalGroupNorm+WS": (lambda: PracticalGroupNorm(16, weight_standardization=True), 2),
    "BatchNormAct2d": (lambda: timm_act(timm_layers.BatchNormAct2d, 16), 2),
    "SyncBatchNormAct": (
        lambda: timm_layers.convert_sync_batchnorm(timm_act(timm_layers.BatchNormAct2d, 16)),
        2,
    ),
    "FrozenBatchNormAct2d": (lambda: timm_act(timm_layers.FrozenBatchNormAct2d, 16), 2),
    "GroupNormAct": (lambda: timm_act(timm_layers.GroupNormAct, 16, 2), 2),
    "GroupNorm1Act": (lambda: timm_act(timm_layers.GroupNorm1Act, 16), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_norm(kind, with_inputs):
    make, dims = KINDS[kind]
    model = nn.Sequential(conv(dims), make())
    old, children = model[1], dict(model[1].named_children())
    eps, is_group_norm = getattr(old, "eps", 1e-5), isinstance(old, nn.GroupNorm)
    for tensor in (old.weight, old.bias):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 1.5)
    affine = {k: v.clone() for k, v in old.state_dict().items() if k in ("weight", "bias")}
    x = torch.randn(2, 64, *[5] * dims)
    convert_norms(model.eval(), "PGN", x if with_inputs else None)
    norm = model[1]
    assert isinstance(norm, PracticalGroupNorm) and norm.num_groups == 16 == brute_force_groups(64, 16)
    assert type(norm).__module__.startswith("gng_d2.") and norm.eps == eps and not norm.weight_standardization
    assert dict(norm.named_children()) == children and not list(norm.buffers())
    assert list(norm.state_dict()) == list(affine)
    for key, fresh in (("weight", 1.0), ("bias", 0.0)):
        if key in affine:
            parameter = getattr(norm, key)
            assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
            assert torch.equal(parameter, affine[key] if is_group_norm else torch.full((16,), fresh))
    right = F.group_norm(model[0](x), 16, norm.weight, norm.bias, eps)
    torch.testing.assert_close(model(x), F.silu(right) if children else right)
    if children:
        assert (model.train()(x) == 0).float().mean() > 0.3, "the dropout"


@pytest.mark.parametrize(
    "name, groups", [("PGN", 16), ("GN", 32), ("GN1", 1), ("GN16", 16), ("GN/16", 4), ("PGN+WS", 16), ("GN/16+WS", 4)]
)
def test_every_name(name, groups):
    model = convert_norms(nn.Sequential(nn.Conv2d(128, 64, 1), nn.BatchNorm2d(64)), name)
    assert model[1].num_groups == groups and model[1].norm_name() == name
    assert (type(model[0]) is gng_d2.WSConv2d) == name.endswith("+WS")
    x = torch.randn(2, 128, 5, 5)
    if name.endswith("+WS"):
        w = model[0].weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        torch.testing.assert_close(model(x), F.group_norm(F.conv2d(x, w, model[0].bias), groups))


def test_gn_with_an_activation_computes_the_same_bits_as_without_this_package(monkeypatch):
    def kernel(*args):
        raise AssertionError("not PyTorch's op")

    monkeypatch.setattr("gng_d2.layers.group_norm.group_norm", kernel)
    model, x = nn.Sequential(nn.Conv2d(3, 64, 1), timm_layers.BatchNormAct2d(64)), torch.randn(1, 3, 32, 32)
    convert_norms(model, "GN")
    right = F.group_norm(model[0](x), 32, model[1].weight, model[1].bias, model[1].eps).relu()
    assert torch.equal(model(x), right)
    with pytest.raises(AssertionError, match="not PyTorch's op"):
        convert_norms(model, "GN16")(x)


# what stays


def test_parameters_stay_the_same_objects():
    model = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, dtype=torch.float64, device="meta"))
    model[1].weight.requires_grad_(False)
    model[1].eval()
    before = list(model.parameters())
    convert_norms(model, "GN2")
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert not model[1].weight.requires_grad and model[1].bias.requires_grad
    assert not model[1].training and model[2].training
    assert model[2].weight.is_meta and model[2].weight.dtype == torch.float64


def test_a_frozen_norm_trains_if_its_layer_does():
    model = nn.Sequential(*[m for _ in range(2) for m in (nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4))])
    model[0].requires_grad_(False)
    convert_norms(model)
    assert [model[i].weight.requires_grad for i in (1, 3)] == [False, True]


def test_zero_initialized_norms_stay_zero():
    model = convert_norms(timm.create_model("resnet10t", zero_init_last=True))
    assert not model.layer1[0].bn2.weight.any() and model.layer1[0].bn1.weight.eq(1).all()


def test_hooks_stay_and_can_be_removed():
    model, calls = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)), []
    handle = model[1].register_forward_hook(lambda *args: calls.append(1))
    convert_norms(model)
    model(torch.randn(1, 8, 3, 3))
    handle.remove()
    model(torch.randn(1, 8, 3, 3))
    assert calls == [1]


def test_timm_features_only():
    model = timm.create_model("resnet18", features_only=True)
    convert_norms(model, "PGN", torch.rand(1, 3, 64, 64))
    assert model(torch.rand(1, 3, 64, 64))[-1].shape == (1, 512, 2, 2) and not replaceable(model)


def test_shared_norms_stay_shared():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.same, self.elsewhere = self.norm, [self.norm]

        def forward(self, x):
            return self.elsewhere[0](self.conv(self.same(self.conv(x))))

    model = convert_norms(Model(), "PGN", torch.randn(1, 8, 3, 3))
    assert isinstance(model.norm, PracticalGroupNorm) and model.same is model.norm is model.elsewhere[0]
    model(torch.randn(1, 8, 3, 3))


def test_a_norm_after_two_layers(caplog):
    """Alike in their sizes: it follows both, and both are standardized. Otherwise it follows no single one."""

    class Model(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.conv, self.other, self.norm = nn.Conv2d(64, 16, 1), nn.Conv2d(other, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x):
            return self.norm(self.conv(x)) + self.norm(self.other(x[:, : self.other.in_channels]))

    x = torch.randn(1, 64, 4, 4)
    alike, different = (convert_norms(Model(other), "PGN+WS", x) for other in (64, 32))
    assert alike.norm.num_groups == 16 and type(alike.conv) is type(alike.other) is gng_d2.WSConv2d
    assert different.norm.num_groups == 1 and type(different.conv) is type(different.other) is nn.Conv2d
    assert "1 follow no single weight layer" in caplog.text
    alike(x), different(x)
    shared = convert_norms(Model(32), "PGN", x)
    for model in (alike, different, shared):
        groups = model.norm.num_groups
        assert bind_norms(model, x).norm.num_groups == groups
        model.train()(x)


def test_a_norm_alone():
    norm = nn.BatchNorm2d(8)
    assert convert_norms(norm, "GN4") is norm and type(norm) is GroupNorm


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["PGN", "PGN+WS", "GN/8"])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_converting_twice_changes_nothing(norm, with_inputs):
    x = torch.rand(1, 3, 64, 64)
    model = convert_norms(timm.create_model("densenet121"), norm, x)
    nn.init.uniform_(model.features.norm5.weight)
    before, state = str(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert str(convert_norms(model, norm, x if with_inputs else None)) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# +WS


def test_what_cannot_be_standardized_keeps_its_weight(caplog):
    layers = [nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.BatchNorm2d(8), nn.ReLU())], nn.BatchNorm2d(8))
    convert_norms(model, "PGN+WS", torch.randn(1, 4, 9, 9))
    assert [model[i].norm_name() for i in (1, 4, 7, 9)] == ["PGN+WS", "PGN", "PGN+WS", "PGN"]
    assert (
        type(layers[1]) is nn.ConvTranspose2d and "2 follow a layer that cannot be standardized (4, 9)" in caplog.text
    )
    model(torch.randn(1, 4, 9, 9)).sum().backward()


def test_from_ws_to_without():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), GroupNorm(2, 8, weight_standardization=True))
    assert type(model[0]) is gng_d2.WSConv2d
    convert_norms(model, "PGN")
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(model[0](x), F.conv2d(x, model[0].weight, model[0].bias))


class OutOfOrder(nn.Module):
    """Its norms are registered behind other layers than those that feed them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)
        self.relu, self.bn1, self.bn2 = nn.ReLU(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


def test_from_ws_to_without_the_layer_that_has_it_has_to_be_known():
    x = torch.randn(1, 4, 5, 5)
    model = convert_norms(OutOfOrder(), "GN4+WS", x)
    before = model(x)
    with pytest.raises(InputError, match="bn[12] has weight standardization, and GN2 has none.*give example_inputs"):
        convert_norms(model, "GN2")
    assert torch.equal(model(x), before)
    convert_norms(model, "GN2", x)
    fresh = convert_norms(OutOfOrder(), "GN2", x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x), fresh(x))


class WithOddNorms(nn.Module):
    """Calls other projects' norms by keyword and with a list, and has a buffer that cannot be written."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.rms, self.level_norm = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), RMSNorm(), RMSNorm()
        self.register_buffer("mean", torch.tensor([0.5]).expand(4)[:, None, None])

    def forward(self, x):
        y = self.rms(hidden_states=self.bn(self.conv(x - self.mean)))
        return self.level_norm([y, y])[0]


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, hidden_states):
        return hidden_states


def test_how_other_norms_are_called_and_what_buffers_are(caplog):
    model = convert_norms(WithOddNorms(), "PGN", torch.randn(1, 4, 5, 5))
    assert model.bn.num_groups == 1 and model.bn.weight_layer.startswith("Conv2d")
    assert "2 are left: RMSNorm (rms, level_norm)" in caplog.text


class AfterConcatenation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(torch.cat([self.a(x), self.b(x)], 1))


def test_from_ws_to_without_where_no_layer_has_it():
    model, x = AfterConcatenation(), torch.randn(1, 4, 5, 5)
    convert_norms(convert_norms(model, "GN2+WS", x), "GN4", x)
    assert model.bn.num_groups == 4


class InTraining(nn.BatchNorm2d):
    """Trains whatever its mode is; PyTorch's op writes its statistics without a trace."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)


def test_statistics_that_a_run_changes_are_restored():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), InTraining(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    convert_norms(model, "PGN", torch.randn(2, 4, 5, 5))
    assert (model[1].running_mean == 0).all() and (model[1].running_var == 1).all()


def test_buffers_that_a_run_changes_are_restored():
    class Counting(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.register_buffer("runs", torch.zeros(1))

        def forward(self, x):
            self.runs += 1
            return super().forward(x)

    model = convert_norms(Counting(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)), "PGN", torch.randn(1, 4, 5, 5))
    assert model.runs == 0


@pytest.mark.parametrize("with_drop", [False, True])
def test_an_activation_in_a_norm_runs_without_a_dropout_too(with_drop):
    """Before 0.6 timm's BatchNormAct2d had no dropout."""
    bn = timm_layers.BatchNormAct2d(8)
    if not with_drop:
        del bn.drop
        bn.__class__ = type("BatchNormAct2d", (nn.BatchNorm2d,), {"__module__": "timm.models.layers", "forward": old})
    model = nn.Sequential(nn.Conv2d(3, 8, 1), bn)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    x = torch.randn(16, 3, 8, 8)
    expected = model.eval()(x)
    convert_norms(model, "GN2", x[:1], calibrate=x)
    assert isinstance(model[1].act, nn.ReLU) and model(x).min() == 0
    assert (model(x) - expected).std() < 0.5 * expected.std() and norm_table(model)[0].calibration_error < 0.5


def old(self, x):
    return self.act(nn.BatchNorm2d.forward(self, x))


# what is left


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.BatchNorm2d):
    pass


class InPlaceABN(nn.Module):
    """Norm and activation in one, as some projects have them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x.relu() * self.weight[:, None, None]


LEFT = {
    "InPlaceABN": InPlaceABN,
    "EvoNorm2dB0": lambda: timm_layers.EvoNorm2dB0(8),
    "EvoNorm2dS0": lambda: timm_layers.EvoNorm2dS0(8, group_size=2),
    "FilterResponseNormAct2d": lambda: timm_layers.FilterResponseNormAct2d(8),
    "LayerNorm": lambda: nn.LayerNorm([8, 4, 4]),
    "LayerNorm2d": lambda: timm_layers.LayerNorm2d(8),
    "LayerNormAct2d": lambda: timm_layers.LayerNormAct2d(8),
    "RmsNorm2d": lambda: timm_layers.RmsNorm2d(8),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8),
    "SplitBatchNorm2d": lambda: timm_layers.convert_splitbn_model(nn.BatchNorm2d(8)),
    "Doubled": lambda: Doubled(8),
    "ParametrizedBatchNorm2d": lambda: nn.utils.parametrize.register_parametrization(
        nn.BatchNorm2d(8), "weight", nn.Softplus()
    ),
}


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("kind", LEFT)
def test_what_cannot_be_replaced_is_named_and_left(kind, with_inputs, caplog):
    model = nn.Sequential(nn.Conv2d(8, 8, 1), LEFT[kind](), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    x = torch.randn(2, 8, 4, 4)
    right = model[:2].eval()(x)
    convert_norms(model, "PGN", x if with_inputs else None)
    assert f"1 are left: {kind}" in caplog.text and "(1)" in caplog.text and "1 norms are PGN" in caplog.text
    assert torch.equal(model[:2](x), right)


def test_a_subclass_without_a_forward_is_replaced():
    assert type(convert_norms(Plain(8))) is PracticalGroupNorm


@needs_torch(2, 4, "lazy modules that are made while ops are watched")
def test_a_lazy_norm(caplog):
    model = nn.Sequential(nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d())
    convert_norms(model)
    assert "1 are left: LazyBatchNorm2d" in caplog.text
    convert_norms(model, "PGN", torch.randn(1, 64, 4, 4))
    assert model[1].num_groups == 8


@pytest.mark.parametrize("with_inputs", [False, True])
def test_a_norm_on_a_2d_input_is_left(with_inputs, caplog):
    model = nn.Sequential(nn.Conv1d(8, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    convert_norms(model, "GN2", torch.randn(2, 8, 3) if with_inputs else None)
    assert type(model[1]) is GroupNorm and type(model[4]) is nn.BatchNorm1d
    assert "1 are left: BatchNorm1d on a 2-d input, which cannot train on a batch of one (4)" in caplog.text


@pytest.mark.parametrize("norm", ["PGN", "PGN+WS"])
def test_a_norm_on_the_input_of_the_model(norm, caplog):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    x = torch.randn(2, 4, 5, 5)
    convert_norms(model, norm, x)
    assert model[0].num_groups == 1 and "1 follow no single weight layer, so n_in is their own width (0)" in caplog.text
    model.train()(x).sum().backward()


def test_a_model_without_norms_says_so(caplog):
    convert_norms(nn.Sequential(nn.Conv2d(4, 2, 1)))
    assert "0 norms are PGN now" in caplog.text


# errors


@pytest.mark.parametrize("name", ["BN", "LN", "pgn", "GN0", "XYZ"])
def test_names_that_are_not_ours(name):
    with pytest.raises(InputError, match=f"unknown norm '{name}'.*PGN") as error:
        convert_norms(nn.BatchNorm2d(8), name)
    assert "SyncBN" not in str(error.value)


def test_groups_that_do_not_divide_name_the_norm_and_change_nothing():
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 48, 1), nn.BatchNorm2d(48))
    with pytest.raises(InputError, match=r"GN cannot replace 3: its 48 channels.*32 groups.*PGN"):
        convert_norms(model, "GN")
    assert type(model[1]) is type(model[3]) is nn.BatchNorm2d
    assert convert_norms(model, "GN/16")[3].num_groups == 3


# a model's own norm_layer


@pytest.mark.parametrize(
    "make", [torchvision.models.resnet50, lambda **options: timm.create_model("resnet50", **options)]
)
def test_norm_layer(make):
    with torch.device("meta"):
        model, converted = make(norm_layer=PracticalGroupNorm), convert_norms(make())
    assert [str(m) for m in model.modules() if isinstance(m, PracticalGroupNorm)] == [
        str(m).replace("Act", "") for m in converted.modules() if isinstance(m, PracticalGroupNorm)
    ]
    assert not gng_d2.unbound_norms(model)


@PARAMETRIZED_WEIGHT_NORM
def test_a_parametrized_convolution_stays_standardized_or_is_an_error():
    x = torch.randn(2, 8, 6, 6)

    def model():
        made = nn.Sequential(nn.Conv2d(8, 16, 3), PracticalGroupNorm(16, weight_standardization=True))
        parametrizations.weight_norm(made[0])
        return made

    converted = model()
    before = converted(x)
    with pytest.raises(InputError, match="0: how it runs cannot be changed.*Remove its parametrizations"):
        convert_norms(converted, "GN/8", x)
    assert torch.equal(converted(x), before)
    again = bind_norms(convert_norms(converted, "PGN+WS", x), x)
    assert again[1].weight_standardization and torch.equal(again(x), before)
    assert norm_table(again)[0].weight_standardized
    fused = fuse_norms(
        convert_norms(nn.Sequential(Conv2d(8, 16, 3, norm=nn.BatchNorm2d(16), activation=F.relu)), "GN1")
    )
    parametrizations.weight_norm(fused[0])
    convert_norms(fused, "PGN+WS", x)  # cannot be standardized, which the log says
    assert fused[0].norm.norm_name() == "PGN" and not isinstance(fused[0], gng_d2.WSConv2d)
