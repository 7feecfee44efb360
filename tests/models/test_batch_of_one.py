"""Training on one image: what convert_norms makes of the norms behind a global pooling."""

import copy

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn

from gng_d2 import GroupNorm, PracticalGroupNorm, bind_norms, convert_norms, norm_table
from gng_d2.layers.record import records_of


def pooled(width, pooling=None):
    """The last norm stands behind a pooling."""
    layers = [nn.Conv2d(3, 256, 1), nn.BatchNorm2d(256), pooling or nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Conv2d(256, width, 1), nn.BatchNorm2d(width))


def groups_of(model):
    return [(row.name, row.norm, row.n_in, row.num_groups) for row in norm_table(model)]


IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    "norm, width, by_name, groups",
    [
        *[("PGN", 64, 64, 4), ("PGN", 16, 16, 1), ("PGN", 8, 8, 1), ("PGN", 128, 32, 8), ("PGN+WS", 64, 64, 4)],
        *[("GN", 256, 32, 16), ("GN/1", 48, 48, 3), ("GN/4", 40, 10, 2), ("GN16", 64, 16, 4), ("GN16+WS", 64, 16, 4)],
    ],
)
def test_groups_hold_16_numbers_behind_a_global_pooling(norm, width, by_name, groups, caplog):
    model = convert_norms(pooled(width), norm, IMAGES)
    assert model[4].num_groups == groups and model[4].norm_name() == f"GN{groups}" + "+WS" * norm.endswith("+WS")
    assert model[1].norm_name() == norm
    said = f"1 follow a global pooling and have fewer groups, to hold 16 numbers in each (4: (N, {width}, 1, 1), "
    assert f"{said}{by_name} to {groups} groups)" in caplog.text and "left" not in caplog.text

    x = IMAGES[:1]
    model.train()(x).square().sum().backward()
    before, y = groups_of(model), model(x)
    assert groups_of(bind_norms(model, IMAGES)) == groups_of(convert_norms(model, norm)) == before
    assert groups_of(convert_norms(model, norm, IMAGES)) == before and torch.equal(model(x), y)
    assert records_of(model.state_dict())["4"]["num_groups"] == groups
    caplog.clear()
    other = convert_norms(pooled(width), norm, IMAGES)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y) and torch.equal(copy.deepcopy(model)(x), y)
    assert "where its weights were trained" not in caplog.text


@pytest.mark.parametrize("norm, width", [("GN1", 8), ("GN/16", 64), ("GN4", 64)])
def test_groups_that_hold_enough_stay(norm, width, caplog):
    model = convert_norms(pooled(width), norm, IMAGES)
    assert model[4].norm_name() == norm and "1 follow" not in caplog.text and "fewer" not in caplog.text


def test_another_name_keeps_16_numbers_without_an_input():
    model = convert_norms(convert_norms(pooled(64), "GN1", IMAGES), "PGN")
    assert model[4].num_groups == 4 and convert_norms(model, "GN16")[4].num_groups == 4


def test_a_pooling_to_few_pixels():
    model = convert_norms(pooled(64, nn.AdaptiveAvgPool2d(2)), "PGN", IMAGES)
    assert model[4].num_groups == 16  # 4 channels on 2 x 2 pixels


@pytest.mark.parametrize("pooling, dims", [(nn.AdaptiveAvgPool1d(1), 1), (nn.AdaptiveMaxPool3d(1), 3)])
def test_other_dimensions(pooling, dims):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = nn.Sequential(conv(3, 64, 1), norm(64), pooling, conv(64, 32, 1), norm(32))
    convert_norms(model, "PGN", torch.randn(2, 3, *[4] * dims))
    assert model[4].num_groups == 2
    model.train()(torch.randn(1, 3, *[4] * dims))


@pytest.mark.parametrize("stride", [8, 100])
@pytest.mark.parametrize("width, becomes", [(64, nn.BatchNorm2d), (128, PracticalGroupNorm)])
def test_small_maps_of_small_images_are_no_pooling(width, becomes, stride, caplog):
    """Those of wider images are larger, so the image is not one that is trained on."""
    model = convert_norms(pooled(width, nn.MaxPool2d(stride, ceil_mode=True)), "PGN", IMAGES)
    assert type(model[4]) is becomes and "give example_inputs of the size that you train on" in caplog.text
    assert f"{'with one number' if width == 64 else 'fewer than 16 numbers'}" in caplog.text
    assert "(4)" in caplog.text and "global pooling" not in caplog.text


def test_a_model_of_one_size(caplog):
    """With wider images it fails, behind the pooling."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pooled, self.head = pooled(64), nn.Linear(3 * 8 * 8, 64)

        def forward(self, x):
            return self.pooled(x).flatten(1) + self.head(x.flatten(1))

    model = convert_norms(Model(), "PGN", IMAGES)
    assert model.pooled[4].num_groups == 4
    model.train()(IMAGES[:1])


def test_what_cannot_train_on_one_image_is_listed(caplog):
    one_channel = pooled(1)
    convert_norms(one_channel, "PGN", IMAGES)
    assert type(one_channel[4]) is nn.BatchNorm2d and type(one_channel[1]) is PracticalGroupNorm
    assert (
        "an input (N, 1, 1, 1) with one number in each group, which cannot train on a batch of one (4)" in caplog.text
    )
    convert_norms(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), "PGN", torch.randn(2, 8))
    assert "BatchNorm1d on a 2-d input, which cannot train on a batch of one (1)" in caplog.text
    convert_norms(nn.Sequential(nn.Linear(8, 4), nn.GroupNorm(2, 4)), "PGN", torch.randn(2, 8))
    assert "GroupNorm on a 2-d input (1)" in caplog.text


def test_a_model_converted_without_an_input_gets_one():
    """Its norm behind the pooling cannot run, as each group would hold one number."""
    model = convert_norms(pooled(64), "PGN")
    assert model[4].num_groups == 64
    assert convert_norms(model, "PGN", IMAGES)[4].num_groups == 4
    model.train()(IMAGES[:1])


MODELS = {
    "torchvision deeplabv3_resnet50": lambda: torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None
    ),
    **{
        f"smp {name}": lambda make=make: make("resnet18", encoder_weights=None)
        for name, make in (("DeepLabV3", smp.DeepLabV3), ("DeepLabV3Plus", smp.DeepLabV3Plus), ("PAN", smp.PAN))
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_segmentation_models_train_on_one_image(name, tmp_path, caplog):
    size = 256 if name == "smp PAN" else 64  # its pyramid begins at a sixteenth
    images = torch.rand(2, 3, size, size)
    model = convert_norms(MODELS[name](), "PGN", images)
    assert not [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = {name: module for name, module in model.named_modules() if isinstance(module, GroupNorm)}
    behind = [norm for norm in norms.values() if norm.pooled_to]
    assert behind and all(norm.num_channels // norm.num_groups >= 16 for norm in behind)
    before = groups_of(bind_norms(model, images))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    caplog.clear()
    again = convert_norms(MODELS[name](), "PGN", images)
    again.load_state_dict(torch.load(tmp_path / "model.pth"))
    assert groups_of(convert_norms(again, "PGN")) == before and "where its weights were trained" not in caplog.text
    out = again.train()(images[:1])
    (out["out"] if isinstance(out, dict) else out).square().mean().backward()
    assert all(norm.weight.grad.isfinite().all() for norm in again.modules() if isinstance(norm, GroupNorm))
