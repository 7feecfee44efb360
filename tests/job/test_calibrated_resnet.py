"""A ResNet with batch norm under torchvision's names becomes a checkpoint of Detectron2's with group norm."""

import copy
import runpy
import sys

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import functional as T

from gng_d2 import calibrate_norms, convert_norms
from gng_d2.job.build import build_on_meta
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_config
from gng_d2.layers.record import records_of
from gng_d2.models.norm_table import norm_table


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1), nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3), nn.init.normal_(module.bias)
    return model.eval()


TURNED = Image.Exif()
TURNED[0x0112] = 6  # shown with the right side up, as phones write it


@pytest.fixture
def images(tmp_path):
    draw, paths = np.random.default_rng(0), []
    for i, (height, width) in enumerate([(90, 70), (64, 100)]):
        small = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(small).resize((width, height)).save(paths[-1], exif=TURNED)
    return paths


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tools/convert_weights.py", *map(str, words)])
    runpy.run_path("tools/convert_weights.py", run_name="__main__")


def test_detectron2_computes_what_the_calibrated_network_does(resnet, images, tmp_path, monkeypatch, capsys):
    torch.save(resnet.state_dict(), tmp_path / "r18.pth")
    words = ["--size", 160, "--pixel-mean", 100, 110, 120, "--pixel-std", 50, 60, 70]
    run(
        monkeypatch, tmp_path / "r18.pth", tmp_path / "new" / "out.pth", "--norm", "GN1", *words, "--calibrate", *images
    )
    said = capsys.readouterr().out
    assert "ResNet-18 with GN1" in said
    assert "MODEL.PIXEL_MEAN [100.0,110.0,120.0] MODEL.PIXEL_STD [50.0,60.0,70.0]" in said

    batches = []
    for path in images:
        image = T.pil_to_tensor(T.resize(ImageOps.exif_transpose(Image.open(path)), 160)).float()
        batches.append(T.normalize(image, [100, 110, 120], [50, 60, 70])[None])
    wanted = calibrate_norms(convert_norms(copy.deepcopy(resnet), "GN1"), resnet, batches).eval()
    config = ["MODEL.RESNETS.NORM", "GN1", "MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.BACKBONE.FREEZE_AT", "0"]
    for checkpointer in (Checkpointer, DetectionCheckpointer):
        model = build_model(load_config("configs/quick/pfpn_pgn.yaml", config)).eval()
        checkpointer(model).resume_or_load(str(tmp_path / "new" / "out.pth"), resume=False)
        with torch.no_grad():
            features = model.backbone.bottom_up(batches[0])["res5"]
            x = wanted.maxpool(wanted.relu(wanted.bn1(wanted.conv1(batches[0]))))
            expected = wanted.layer4(wanted.layer3(wanted.layer2(wanted.layer1(x))))
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def test_the_file_records_its_norms(resnet, images, tmp_path, monkeypatch):
    torch.save(resnet.state_dict(), tmp_path / "r18.pth")
    run(monkeypatch, tmp_path / "r18.pth", tmp_path / "out.pth", "--norm", "PGN", "--size", 32, "--calibrate", *images)
    found = records_of(torch.load(tmp_path / "out.pth", weights_only=True)["model"])
    model = build_on_meta(load_config("configs/quick/pfpn_pgn.yaml", ["MODEL.RESNETS.NORM", "PGN"]))
    wanted = {row.name: row.num_groups for row in norm_table(model) if "bottom_up" in row.name}
    assert {name: record["num_groups"] for name, record in found.items()} == wanted


@pytest.mark.parametrize(
    "norm, out, message",
    [
        ("GN1", "out.pkl", "must end in .pth"),
        ("BN", "out.pth", "--norm BN is no group norm"),
        ("GN1", "out.pth", "none.png cannot be read as an image"),
    ],
)
def test_what_cannot_be_is_one_line(norm, out, message, resnet, images, tmp_path, monkeypatch):
    torch.save(resnet.state_dict(), tmp_path / "r18.pth")
    images += ["none.png"] * ("none.png" in message)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, tmp_path / "r18.pth", tmp_path / out, "--norm", norm, "--size", 32, "--calibrate", *images)
    assert message in str(exit.value)
    assert not (tmp_path / out).exists()


def test_the_flags_need_each_other(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "in.pth", "out.pth", "--norm", "GN1")
    assert "need each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [(["--size", "0"], "--size: 0: at least 1"), (["--pixel-std", "1", "0", "1"], "--pixel-std is above 0")],
)
def test_sizes_and_deviations_are_above_0(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "in.pth", "out.pth", "--norm", "GN1", *flags, "--calibrate", "a.jpg")
    assert message in capsys.readouterr().err
