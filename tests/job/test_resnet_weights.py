"""A ResNet under torchvision's names computes the same in Detectron2, through the file that the tool writes."""

import os
import pickle
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn
from torch.nn import functional as F

import gng_d2
from gng_d2.errors import InputError
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.resnet_weights import _BLOCKS, convert_file, convert_resnet
from gng_d2.job.weight_files import read_weight_file

TOOL = Path(__file__).parents[2] / "tools" / "convert_weights.py"


class StandardizedConv2d(nn.Conv2d):
    """Weight standardization as Qiao et al. define it, written down once more."""

    def forward(self, x):
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), unbiased=True, keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def timm_resnet50_gn():
    return pytest.importorskip("timm").create_model("resnet50_gn", pretrained=False)


def torchvision_gn(depth=50):
    return getattr(torchvision.models, f"resnet{depth}")(norm_layer=lambda channels: nn.GroupNorm(32, channels))


def torchvision_gn_ws(depth=50):
    model = torchvision_gn(depth)
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = StandardizedConv2d
    return model


def randomized(model):
    """Norms as far from their initial ones and zeros as trained ones are."""
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def stages(model, x):
    """The outputs of layer1 ... layer4 of a torchvision or timm ResNet."""
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    features = {}
    for i in range(1, 5):
        features[f"res{i + 1}"] = x = getattr(model, f"layer{i}")(x)
    return features


def detectron2_resnet(norm, depth=50, num_groups=1, width=64):
    """Detectron2's ResNet, inside a module that gives its weights the prefix that they have in a detector."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.STRIDE_IN_1X1 = depth, norm, False
    resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = num_groups, width
    resnets.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if depth < 50:
        resnets.RES2_OUT_CHANNELS = 64
    resnet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": resnet})}).eval(), resnet


@torch.no_grad()
def check_features(model, folder, norm, **sizes):
    """``model`` and Detectron2's ResNet with ``norm`` agree after a save, a conversion and a load."""
    torch.save(model.state_dict(), folder / "in.pth")
    conversion = convert_file(str(folder / "in.pth"), str(folder / "out.pkl"))
    detector, resnet = detectron2_resnet(norm, conversion.depth, **sizes)
    Checkpointer(detector).load(str(folder / "out.pkl"))
    loaded = resnet.state_dict()
    counters = {name for name in loaded if name.endswith("num_batches_tracked")}
    assert set(loaded) - counters == set(conversion.weights)

    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)  # in which fifty layers add no rounding to speak of
    expected, features = stages(model.double(), x), resnet.double()(x)
    for name in ("res2", "res3", "res4", "res5"):
        scale = expected[name].std()
        assert scale > 0.1
        torch.testing.assert_close(features[name] / scale, expected[name] / scale, rtol=0, atol=1e-4)
    return conversion


@pytest.mark.slow
def test_timm_resnet50_gn(tmp_path):
    torch.manual_seed(0)
    conversion = check_features(randomized(timm_resnet50_gn()), tmp_path, "GN")
    assert (conversion.depth, conversion.norm, len(conversion.weights)) == (50, "GN", 3 * 53)
    assert conversion.dropped == {"the classifier": ["fc.weight", "fc.bias"]}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(gng_d2, "WSConv2d"), reason="needs WSConv2d")
def test_gn_ws_resnet50(tmp_path):
    torch.manual_seed(0)
    check_features(randomized(torchvision_gn_ws()), tmp_path, "GN+WS")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, sizes", [("resnet18", {}), ("resnet50", {}), ("resnext50_32x4d", {"num_groups": 32, "width": 4})]
)
def test_torchvision_bn(tmp_path, name, sizes):
    torch.manual_seed(0)
    conversion = check_features(randomized(getattr(torchvision.models, name)()), tmp_path, "FrozenBN", **sizes)
    assert conversion.norm == "BN" and list(conversion.dropped) == ["the classifier", "counters of BatchNorm's steps"]
    assert (conversion.num_groups, conversion.width_per_group) == (sizes.get("num_groups", 1), sizes.get("width", 64))


# A state dict of full shapes in little memory: each filter is one number.


def thin(model):
    return {
        name: torch.randn(p.shape[:1]).view(-1, *[1] * (p.dim() - 1)).expand(p.shape) if p.is_floating_point() else p
        for name, p in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return thin(torchvision_gn(18))


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: prefixed(state, "module."),
        lambda state: {"state_dict": state, "epoch": 90, "optimizer": {"state": {}, "lr": 0.1}},
        lambda state: {"model": prefixed(state, "module."), "epoch": 90},
        lambda state: {"meta": {"text": "of mmdetection"}, "state_dict": prefixed(state, "backbone.")},
        lambda state: {"state_dict": {**prefixed(state, "module.backbone."), "module.head.fc.weight": torch.ones(1)}},
        lambda state: {name.replace("bn", "gn"): value for name, value in state.items()},
        lambda state: {name.replace("bn", "norm"): nn.Parameter(value.half()) for name, value in state.items()},
    ],
)
def test_wrappers_prefixes_and_norm_names(tmp_path, resnet18, wrap, suffix):
    resnet18 = {name: value.half().float() for name, value in resnet18.items()}
    path = tmp_path / f"in{suffix}"
    torch.save(wrap(resnet18), path, _use_new_zipfile_serialization=suffix != ".pth.tar")
    expected = convert_resnet(resnet18)
    conversion = convert_resnet(read_weight_file(str(path)))
    assert conversion.weights.keys() == expected.weights.keys()
    assert all(np.array_equal(conversion.weights[name], value) for name, value in expected.weights.items())
    assert all(value.dtype == np.float32 for value in conversion.weights.values())
    assert {"fc.weight", "fc.bias"} == set(conversion.dropped["the classifier"])


def test_says_what_it_dropped(resnet18):
    state = {**prefixed(resnet18, "backbone."), "neck.conv.weight": torch.ones(1)}
    dropped = convert_resnet({"state_dict": state, "optimizer": {}, "epoch": 3}).dropped
    assert dropped["beside the weights"] == ["optimizer", "epoch"]
    assert dropped["outside the backbone"] == ["neck.conv.weight"]


def test_safetensors(tmp_path, resnet18):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({name: value.contiguous() for name, value in resnet18.items()}, tmp_path / "in.safetensors")
    conversion = convert_file(str(tmp_path / "in.safetensors"), str(tmp_path / "out.pkl"), depth=18)
    expected = convert_resnet(resnet18).weights
    assert all(np.array_equal(conversion.weights[name], expected[name]) for name in expected)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "in.safetensors").read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"cut\.safetensors cannot be read as weights"):
        read_weight_file(str(tmp_path / "cut.safetensors"))


def test_file_is_what_detectron2_loads(tmp_path, resnet18):
    torch.save(resnet18, tmp_path / "in.pth")
    convert_file(str(tmp_path / "in.pth"), str(tmp_path / "out.pkl"))
    with open(tmp_path / "out.pkl", "rb") as file:
        content = pickle.load(file)
    assert content["matching_heuristics"] is True and "in.pth" in content["__author__"]
    assert all(type(value) is np.ndarray for value in content["model"].values())
    assert np.array_equal(content["model"]["res3.0.shortcut.norm.bias"], resnet18["layer2.0.downsample.1.bias"])
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.pkl"]


@pytest.mark.parametrize(
    "prefix", ["module.encoder_q.", "_orig_mod.", "ema_model.module.", "model.backbone.", "net.0."]
)
def test_any_prefix_is_stripped(prefix, resnet18):
    """Of MoCo, torch.compile, EMA, Lightning."""
    conversion = convert_resnet({"state_dict": {**prefixed(resnet18, prefix), "queue": torch.ones(1)}})
    expected = convert_resnet(resnet18).weights
    assert all(np.array_equal(conversion.weights[name], expected[name]) for name in expected)
    assert conversion.dropped["outside the backbone"] == ["queue"]


def test_of_two_prefixes_both_are_named(resnet18):
    weights = {f"encoder_{which}.{name}": value for which in "qk" for name, value in resnet18.items()}
    with pytest.raises(InputError, match="several ResNets, under 'encoder_q.', 'encoder_k.'"):
        convert_resnet(weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(value, resnet18):
    broken = resnet18["layer1.0.conv1.weight"].double()
    broken[0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"NaN or infinite weights, in layer1\.0\.conv1\.weight$"):
        convert_resnet({**resnet18, "layer1.0.conv1.weight": broken})


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    "change, depth, message",
    [
        (lambda s: {"features.0.weight": torch.ones(1)}, None, r"no ResNet under .*features\.0\.weight"),
        (lambda s: {}, None, "empty"),
        (lambda s: [1, 2], None, "no weights by name"),
        (lambda s: s, 50, "a ResNet-18, not a ResNet-50"),
        (lambda s: without(s, "layer2.1.bn2.bias"), None, r"not whole, missing: layer2\.1\.bn2\.bias$"),
        (lambda s: without(s, "layer2.1.bn2.bias"), 18, r"layer2\.1\.bn2\.bias"),
        (lambda s: without(s, "conv1.weight"), None, r"missing: conv1\.weight$"),
        (lambda s: {**s, "layer1.0.se.fc1.weight": torch.ones(1)}, None, r"no place for layer1\.0\.se\.fc1\.weight"),
        (lambda s: {**s, "gn1.weight": s["bn1.weight"]}, None, r"no place for gn1\.weight"),
        (lambda s: {**s, "module.conv1.weight": s["conv1.weight"]}, None, r"no place for module\.conv1\.weight"),
        (lambda s: {**s, "conv1.weight": torch.ones(64, 3, 3, 3)}, None, r"conv1\.weight has .* \(64, 3, 3, 3\)"),
        (lambda s: {**s, "conv1.weight": torch.ones(())}, None, r"conv1\.weight has the shape \(\)"),
        (lambda s: {**s, "bn1.weight": torch.ones(64, dtype=torch.int8)}, None, r"bn1\.weight is no dense tensor"),
        (lambda s: {**s, "bn1.weight": 1.0}, None, r"bn1\.weight is no dense tensor"),
        (lambda s: {n: v for n, v in s.items() if not n.startswith("layer4")}, None, "have 2, 2, 2, 0 basic blocks"),
        (lambda s: {**s, "bn1.running_mean": torch.ones(64)}, None, r"missing: bn1\.running_var, .* and 35 more"),
    ],
)
def test_refusals(resnet18, change, depth, message):
    with pytest.raises(InputError, match=message):
        convert_resnet(change(resnet18), depth)


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet26", "2, 2, 2, 2 bottleneck blocks"),
        ("seresnet50", "no place for"),
        ("resnet50d", r"no place for conv1\.0\.weight"),
    ],
)
def test_refuses_other_resnets(name, message):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False).state_dict()
    with pytest.raises(InputError, match=message):
        convert_resnet(state)


class Executed:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))])
def test_nothing_in_the_file_is_executed(tmp_path, resnet18, save):
    path, mark = tmp_path / "in.pth", tmp_path / "executed"
    save({"state_dict": resnet18, "args": Executed(str(mark))}, path)
    with pytest.raises(InputError, match=r"in\.pth .*") as error:
        convert_file(str(path), str(tmp_path / "out.pkl"))
    assert not mark.exists() and not (tmp_path / "out.pkl").exists()
    assert "weights_only" not in str(error.value)
    if save is torch.save:
        assert "mkdir" in str(error.value) and "Nothing of it was run" in str(error.value)
    with path.open("rb") as file:  # the trap does snap
        torch.load(file, weights_only=False) if save is torch.save else pickle.load(file)
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 100, 5000, 100_000])
def test_truncated(tmp_path, resnet18, zipped, kept):
    path = tmp_path / "in.pth"
    torch.save(resnet18, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: min(kept, path.stat().st_size - 1)])
    with pytest.raises(InputError, match=r"in\.pth (cannot be read as weights|is damaged)"):
        convert_file(str(path), str(tmp_path / "out.pkl"))
    assert os.listdir(tmp_path) == ["in.pth"]


def test_bad_paths(tmp_path, resnet18):
    good = str(tmp_path / "in.pth")
    torch.save(resnet18, good)
    before = Path(good).read_bytes()
    for path in ("absent.pth", "absent.safetensors"):
        with pytest.raises(InputError, match=rf"{path}.*No such file"):
            convert_file(str(tmp_path / path), str(tmp_path / "out.pkl"))
    with pytest.raises(InputError, match=r"cannot read .*Is a directory"):
        convert_file(str(tmp_path), str(tmp_path / "out.pkl"))
    with pytest.raises(InputError, match=r"out\.pth must end in \.pkl"):
        convert_file(good, str(tmp_path / "out.pth"))
    with pytest.raises(InputError, match=r"cannot write .*in\.pth/out\.pkl"):
        convert_file(good, str(tmp_path / "in.pth" / "out.pkl"))
    convert_file(good, str(tmp_path / "made" / "out.pkl"))
    assert (tmp_path / "made" / "out.pkl").stat().st_size > 40e6
    (tmp_path / "taken.pkl").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*taken\.pkl"):
        convert_file(good, str(tmp_path / "taken.pkl"))
    with tarfile.open(tmp_path / "real.pth.tar", "w") as tar:
        tar.add(good, "in.pth")
    with pytest.raises(InputError, match=r"real\.pth\.tar is a tar archive"):
        convert_file(str(tmp_path / "real.pth.tar"), str(tmp_path / "out.pkl"))
    assert Path(good).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "made", "real.pth.tar", "taken.pkl"]


def test_failed_write_leaves_what_was_there(tmp_path, resnet18, monkeypatch):
    torch.save(resnet18, tmp_path / "in.pth")
    (tmp_path / "out.pkl").write_bytes(b"before")

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gng_d2.job.resnet_weights.pickle.dump", full)
    with pytest.raises(InputError, match=r"cannot write .*out\.pkl: No space left"):
        convert_file(str(tmp_path / "in.pth"), str(tmp_path / "out.pkl"))
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.pkl"] and (tmp_path / "out.pkl").read_bytes() == b"before"


def run_tool(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_the_tool_takes_every_depth(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, "--help")
    assert f"--depth {{{','.join(map(str, _BLOCKS))}}}" in capsys.readouterr().out


def test_tool(tmp_path, monkeypatch, capsys):
    torch.save(thin(torchvision.models.resnet18()), tmp_path / "in.pth")
    run_tool(monkeypatch, tmp_path / "in.pth", tmp_path / "out.pkl", "--depth", 18)
    said = capsys.readouterr().out
    for text in (
        "ResNet-18 with BatchNorm, from 100 tensors",
        "the classifier: fc.weight, fc.bias",
        " and 16 more",
        "bn1.num_batches_tracked",
        "MODEL.RESNETS.RES2_OUT_CHANNELS 64",
        "MODEL.RESNETS.STRIDE_IN_1X1 False",
        "INPUT.FORMAT RGB MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]",
        "These weights do not fit GN",
    ):
        assert text in said
    with pytest.raises(SystemExit, match=r"^error: .*in\.pth: it is a ResNet-18, not a ResNet-50$"):
        run_tool(monkeypatch, tmp_path / "in.pth", tmp_path / "other.pkl", "--depth", 50)
    assert not (tmp_path / "other.pkl").exists()
