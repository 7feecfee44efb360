import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from gng_d2.checkpoint import Checkpointer
from gng_d2.config import load_config
from gng_d2.errors import InputError


def model(*overrides):
    return build_model(load_config("configs/quick/pfpn_pgn.yaml", overrides))


def warnings_of_loading(model, path, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="gng_d2"):
        Checkpointer(model).load(str(path))
    return [r.message for r in caplog.records if r.name == "gng_d2.checkpoint"]


def caffe2_file(path, norm):
    """As MSRA/R-50.pkl is: Caffe2's names, BatchNorm folded to a scale and a bias."""
    scale, bias = np.full(64, 7, np.float32), np.full(64, -3, np.float32)
    weights = {"conv1_w": np.zeros((64, 3, 7, 7), np.float32)}
    for layer in ("res_conv1" if norm == "bn" else "conv1", "res2_0_branch2a"):
        weights.update({f"{layer}_{norm}_s": scale, f"{layer}_{norm}_b": bias})
    path.write_bytes(pickle.dumps(weights))
    return path


def test_folded_batch_norms_in_group_norms_are_one_warning(tmp_path, caplog):
    file = caffe2_file(tmp_path / "R-18.pkl", "bn")
    ours = model("MODEL.RESNETS.NORM", "PGN", "MODEL.BACKBONE.FREEZE_AT", "2")
    (message,) = warnings_of_loading(ours, file, caplog)
    assert ours.backbone.bottom_up.stem.conv1.norm.weight[0] == 7  # they did arrive
    assert message.startswith("2 GroupNorm layers (backbone.bottom_up.stem.conv1.norm, ")
    assert "2 of them are frozen" in message and "MODEL.WEIGHTS ''" in message and "FREEZE_AT 0" in message


def test_group_norm_weights_and_batch_norm_models_are_no_warning(tmp_path, caplog):
    gn = caffe2_file(tmp_path / "R-18-GN.pkl", "gn")
    ours = model("MODEL.RESNETS.NORM", "PGN")
    assert warnings_of_loading(ours, gn, caplog) == []
    assert ours.backbone.bottom_up.stem.conv1.norm.weight[0] == 7
    bn = caffe2_file(tmp_path / "R-18.pkl", "bn")
    assert warnings_of_loading(model("MODEL.RESNETS.NORM", "FrozenBN"), bn, caplog) == []


@pytest.mark.parametrize("heuristics", [False, True])
def test_batch_norms_with_statistics(heuristics, tmp_path, caplog):
    """As torchvision's R-50.pkl and every Detectron2 checkpoint of a BN model."""
    state = model("MODEL.RESNETS.NORM", "BN").backbone.bottom_up.state_dict()
    prefix = "" if heuristics else "backbone.bottom_up."
    weights = {prefix + k: v.numpy() for k, v in state.items()}
    file = tmp_path / "R-18.pkl"
    file.write_bytes(pickle.dumps({"model": weights, "__author__": "us", "matching_heuristics": heuristics}))
    # a stem, 8 blocks of 2, and 3 shortcuts
    (message,) = warnings_of_loading(model("MODEL.RESNETS.NORM", "GN"), file, caplog)
    assert message.startswith("20 GroupNorm layers")


HEAD = "MODEL.SEM_SEG_HEAD.NORM"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of the quick model with PGN+WS in its semantic head."""
    folder = tmp_path_factory.mktemp("run")
    Checkpointer(model(HEAD, "PGN+WS"), str(folder)).save("model_final", iteration=7)
    return folder / "model_final.pth"


def test_a_checkpoint_records_its_norms_and_plain_detectron2_loads_it(trained):
    recorded = torch.load(trained, weights_only=True)["norms"]
    assert recorded["sem_seg_head.p2.0.norm"] == {"num_groups": 8, "weight_standardized": True}
    assert recorded["backbone.bottom_up.stem.conv1.norm"] == {"num_groups": 32, "weight_standardized": False}
    plain = model(HEAD, "PGN+WS")
    rest = DetectionCheckpointer(plain).load(str(trained))
    assert rest["iteration"] == 7
    Checkpointer(plain).load(str(trained))


@pytest.mark.parametrize("norm, here", [("GN", "32 groups"), ("GN1+WS", "1 group and WS"), ("PGN", "8 groups")])
def test_other_norms_are_an_error_when_evaluated_or_resumed(norm, here, trained):
    other = model(HEAD, norm)
    message = rf"7 differ:\n  sem_seg_head.p2.0.norm: 8 groups and WS in the checkpoint, {here} here"
    if norm == "GN1+WS":  # the 32->32 convolutions have one group under PGN too
        message = message.replace("7", "4", 1)
    with pytest.raises(InputError, match=message):
        Checkpointer(other).load(str(trained))
    with pytest.raises(InputError, match="other norms"):
        Checkpointer(other, str(trained.parent)).resume_or_load("", resume=True)


def test_other_norms_are_a_warning_when_fine_tuned(trained, caplog):
    with caplog.at_level(logging.WARNING, logger="gng_d2"):
        Checkpointer(model(HEAD, "GN1")).resume_or_load(str(trained), resume=False)
    (message,) = [r.message for r in caplog.records if r.name == "gng_d2.checkpoint"]
    assert message.startswith("7 norms start") and "sem_seg_head.p2.0.norm" in message


def test_a_checkpoint_without_the_record_is_taken_as_it_is(trained, tmp_path, caplog):
    data = torch.load(trained)
    del data["norms"]
    torch.save(data, tmp_path / "elsewhere.pth")
    other = model(HEAD, "GN1")
    assert warnings_of_loading(other, tmp_path / "elsewhere.pth", caplog) == []
    assert torch.equal(other.state_dict()["sem_seg_head.p2.0.weight"], data["model"]["sem_seg_head.p2.0.weight"])


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_forgetting_the_norm_is_an_error(norm, trained):
    """PGN weights fit a batch norm as well, and its missing statistics would be made up."""
    with pytest.raises(InputError, match=r"sem_seg_head.p2.0.norm: 8 groups and WS in the checkpoint, a norm without"):
        Checkpointer(model(HEAD, norm)).load(str(trained))
    with pytest.raises(InputError, match="8 groups and WS in the checkpoint, no norm here"):
        Checkpointer(model(HEAD, "")).load(str(trained))


def test_a_model_without_a_head_takes_the_rest(trained):
    Checkpointer(model(HEAD, "PGN+WS", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")).load(str(trained))


@pytest.mark.parametrize("content", [{"state_dict": {}, "epoch": 3}, [1, 2], {"model": {"a": "b"}}])
def test_a_checkpoint_of_another_kind_is_named(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth"):
        Checkpointer(torch.nn.Linear(2, 2)).load(str(tmp_path / "other.pth"))


def test_weights_that_cannot_be_fetched_are_named():
    with pytest.raises(InputError, match="MODEL.WEIGHTS: catalog://nothing/x cannot be fetched"):
        Checkpointer(torch.nn.Linear(2, 2)).load("catalog://nothing/x")


@pytest.mark.parametrize("name", ["text.pth", "text.pkl", "cut.pth", "other.pkl"])
def test_a_file_that_is_no_checkpoint_is_named(name, tmp_path):
    file = tmp_path / name
    if name == "cut.pth":
        torch.save({"model": {"a": torch.zeros(1000)}}, file)
        file.write_bytes(file.read_bytes()[:700])
    elif name == "other.pkl":
        file.write_bytes(pickle.dumps([1, 2, 3]))
    else:
        file.write_text("Not found")
    before = file.read_bytes()
    with pytest.raises(InputError, match=rf"{name} cannot be read as a checkpoint"):
        Checkpointer(torch.nn.Linear(2, 2)).load(str(file))
    assert file.read_bytes() == before
