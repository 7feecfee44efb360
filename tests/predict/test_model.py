"""Weights that do not fit the model are refused by the tools that predict and export."""

import pickle
import sys

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model
from torch import nn

import export
import predict
from command_line import run_tool
from gng_d2.errors import InputError
from gng_d2.job.checkpoint import load_model
from gng_d2.job.config import load_config


def network(norm="PGN", width=16, blocks=1, mask_head=False):
    """A model like Detectron2's: its layers have their norm inside, and a config may leave out heads."""

    def layer(n_in):
        made = get_norm(norm, width)
        return Conv2d(n_in, width, 1, bias=made is None, norm=made)

    model = nn.Module()
    model.stage = nn.Sequential(layer(8), *(layer(width) for _ in range(blocks)))
    model.heads = nn.ModuleDict({"box": nn.Linear(width, 4), **({"mask": nn.Linear(width, 1)} if mask_head else {})})
    return model


def saved(path, weights):
    if path.suffix == ".pkl":
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))
    else:
        torch.save({"model": weights}, path)
    return str(path)


@pytest.mark.parametrize("ending", ["pth", "pkl"])
@pytest.mark.parametrize(
    "weights, message",
    [
        (lambda: dict(list(network().state_dict().items())[:3]), "lacks 5 of the model's 8 weights: stage.1.weight, "),
        (lambda: dict(list(network().state_dict().items())[4:]), "lacks 4 of the model's 8 weights: stage.0.weight, "),
        (
            lambda: network().state_dict() | {"heads.box.weight": torch.zeros(5, 16)},
            r"other shapes: heads.box.weight \(\(5, 16\) there, \(4, 16\) in the model\)\. Use the config",
        ),
        (lambda: network(width=32).state_dict(), r"other shapes: stage.0.weight .* and 3 more"),
        (
            lambda: {name: tensor[:1] for name, tensor in network().state_dict().items()},
            r"no weight of this model: it has stage.0.weight of shape \(1, 8, 1, 1\), not \(16, 8, 1, 1\)",
        ),
        (
            lambda: network(blocks=2).state_dict(),
            "of another model, with layers that this one lacks: stage.2.weight, stage.2.norm.weight, stage.2.norm.bias",
        ),
        (lambda: network("BN").state_dict(), "layers that this one lacks: stage.0.norm.running_mean"),
        (lambda: network("").state_dict(), "lacks 4 of the model's 8 weights: stage.0.norm.weight"),
        (
            lambda: {f"ema.{name}": tensor for name, tensor in network().state_dict().items()},
            "holds no weight of this model: it has ema.stage.0.weight",
        ),
        (
            lambda: network().state_dict() | {"heads.box.bias": torch.full((4,), torch.inf)},
            "not finite: heads.box.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_first_of_them(weights, message, ending, tmp_path):
    with pytest.raises(InputError, match=f"a.{ending}.*{message}"):
        load_model(network(), saved(tmp_path / f"a.{ending}", dict(weights())))


@pytest.mark.parametrize("ending", ["pth", "pkl"])
@pytest.mark.parametrize("more", ["module.", "a head", "num_batches_tracked"])
def test_weights_that_fit_are_loaded(more, ending, tmp_path):
    norm = "FrozenBN" if more == "num_batches_tracked" else "PGN"
    trained = network("BN" if norm == "FrozenBN" else norm, mask_head=more == "a head")
    prefix = more if more == "module." else ""
    weights = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    model = load_model(network(norm), saved(tmp_path / f"a.{ending}", weights))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert norm != "FrozenBN" or isinstance(model.stage[0].norm, FrozenBatchNorm2d)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name])


def test_a_weight_under_one_of_its_two_names_is_not_missing(tmp_path):
    model, trained = network(), network()
    model.heads["again"] = model.heads["box"]
    load_model(model, saved(tmp_path / "a.pth", trained.state_dict()))
    torch.testing.assert_close(model.heads["again"].weight, trained.heads["box"].weight)


def test_no_file_is_no_weights():
    with pytest.raises(InputError, match="no file of weights is given"):
        load_model(network(), "")


WORDS = "MODEL.META_ARCHITECTURE SemanticSegmentor MODEL.FPN.OUT_CHANNELS 32 MODEL.DEVICE cpu DATASETS.TEST ()".split()
LAZY = f"""
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, transforms as T
from detectron2.modeling import build_model
from gng_d2.job.config import load_config

def make():
    return build_model(load_config("configs/quick/pfpn_pgn.yaml", {WORDS}))

resize = L(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)
mapper = L(DatasetMapper)(is_train=False, image_format="BGR", augmentations=[resize])
model = L(make)()
train = dict(device="cuda")
dataloader = dict(test=dict(dataset=dict(names=[]), mapper=mapper))
"""


@pytest.mark.slow
def test_a_lazy_config_is_exported(tmp_path, monkeypatch, capsys):
    (tmp_path / "lazy.py").write_text(LAZY)
    model = build_model(load_config("configs/quick/pfpn_pgn.yaml", WORDS)).eval()
    weights = saved(tmp_path / "a.pth", model.state_dict())
    argv = ["export.py", "--config-file", tmp_path / "lazy.py", "--weights", weights, "--format", "torchscript"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*argv, "--output", tmp_path / "a.pt", "train.device=cpu")])
    run_tool(export.main)
    assert "BGR from 0 to 255, resized as the config says (here to 64 x 64)" in capsys.readouterr().out
    image = torch.rand(3, 70, 90) * 255
    with torch.no_grad():
        expected = model([{"image": image}])[0]["sem_seg"]
    torch.testing.assert_close(torch.jit.load(tmp_path / "a.pt")(image)[0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["yaml", "py"])
@pytest.mark.parametrize("tool", [predict, export], ids=["predict", "export"])
def test_both_tools_refuse_them(tool, kind, shapes, tmp_path, monkeypatch):
    (tmp_path / "lazy.py").write_text(LAZY)
    weights = build_model(load_config("configs/quick/pfpn_pgn.yaml", WORDS)).state_dict()
    first_missing = list(weights)[3]
    path = saved(tmp_path / "three.pkl", dict(list(weights.items())[:3]))
    config, words = (tmp_path / "lazy.py", []) if kind == "py" else ("configs/quick/pfpn_pgn.yaml", WORDS)
    out, image = tmp_path / "out", next((shapes / "gng_shapes" / "val").iterdir())
    flags = ["--input", image] if tool is predict else ["--format", "torchscript"]
    argv = [tool.__name__, "--config-file", config, "--weights", path, *flags, "--output", out, *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    with pytest.raises(SystemExit) as error:
        run_tool(tool.main)
    assert str(error.value).startswith(
        f"error: {path} lacks {len(weights) - 3} of the model's {len(weights)} weights: "
    )
    assert first_missing in str(error.value)
    assert not out.is_file() and not list(out.glob("*") if out.is_dir() else [])
