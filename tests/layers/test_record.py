"""The record of the norms in a state_dict, in programs that know nothing of it."""

import copy
import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer
from needs import LOOK
from torch import nn

from gng_d2 import bind_norms, norm_table
from gng_d2.errors import InputError
from gng_d2.layers import GroupNorm, PracticalGroupNorm, WSConv2d
from gng_d2.layers.record import norm_record, records_of


def net(norm):
    layers = [nn.Conv2d(64, 64, 1), norm(), nn.ReLU(), nn.Conv2d(64, 64, 1), norm()]
    return nn.ModuleDict({"body": nn.Sequential(*layers), "head": nn.Linear(2, 2)})


def pgn():
    return PracticalGroupNorm(64)  # 1 group after 64 -> 64


def gn16():
    return GroupNorm(16, 64)


def messages(caplog, level):
    return [r.message for r in caplog.records if r.name.startswith("gng_d2") and r.levelno == level]


def load_state_dict(model, path):
    model.load_state_dict(torch.load(path, weights_only=True)["model"])


def fvcores(model, path):
    Checkpointer(model).load(str(path))


def detectron2s(model, path):
    DetectionCheckpointer(model).load(str(path))


LOADERS = [load_state_dict, fvcores, detectron2s]


@pytest.fixture
def saved(tmp_path):
    """As Detectron2's own train_net writes a checkpoint."""
    Checkpointer(net(pgn), str(tmp_path)).save("model_final")
    return tmp_path / "model_final.pth"


@pytest.mark.parametrize("load", LOADERS)
def test_other_groups_are_one_warning_in_any_loader(load, saved, caplog):
    with caplog.at_level(logging.INFO):
        load(net(gn16), saved)
    assert messages(caplog, logging.INFO) == []
    (warning,) = messages(caplog, logging.WARNING)
    assert warning.startswith("body.1: 16 groups here, 1 group where its weights were trained")


@pytest.mark.parametrize("load", LOADERS)
def test_the_same_groups_are_silent(load, saved, caplog):
    with caplog.at_level(logging.INFO):
        load(net(pgn), saved)
        load(net(lambda: GroupNorm(1, 64)), saved)
    assert messages(caplog, logging.WARNING) == messages(caplog, logging.INFO) == []


@pytest.mark.parametrize("load", LOADERS)
def test_weights_without_a_record_are_one_line_unless_all_norms_are_gn(load, saved, caplog):
    data = torch.load(saved)
    torch.save({"model": dict(data["model"])}, saved)
    with caplog.at_level(logging.INFO):
        load(net(gn16), saved)
        load(net(lambda: GroupNorm(32, 64)), saved)
    (line,) = messages(caplog, logging.INFO)
    assert line.startswith("body.1: its groups were not checked")
    assert messages(caplog, logging.WARNING) == []


def test_no_key_is_added():
    assert list(net(pgn).state_dict()) == list(net(lambda: nn.GroupNorm(8, 64)).state_dict())


def test_what_keeps_the_record(saved, caplog):
    state = net(pgn).state_dict()
    ddp = nn.DataParallel(net(pgn)).state_dict()  # module. before each name
    averaged = copy.deepcopy(net(pgn)).state_dict()
    for weights in (state, copy.deepcopy(state), averaged):
        caplog.clear()
        net(gn16).load_state_dict(weights)
        assert len(messages(caplog, logging.WARNING)) == 1
    caplog.clear()
    torch.save({"model": ddp}, saved)
    fvcores(net(gn16), saved)
    nn.DataParallel(net(gn16)).load_state_dict(ddp)
    assert len(messages(caplog, logging.WARNING)) == 2


def test_what_is_not_loaded_is_not_compared(caplog):
    weights = net(pgn).state_dict()
    for name in [name for name in weights if name.startswith("body")]:
        del weights[name]
    with caplog.at_level(logging.INFO):
        net(gn16).load_state_dict(weights, strict=False)
        net(gn16)["body"].load_state_dict(net(gn16)["body"].state_dict())
    assert messages(caplog, logging.WARNING) == messages(caplog, logging.INFO) == []


def test_a_part_and_a_single_norm_are_compared(caplog):
    net(gn16)["body"].load_state_dict(net(pgn)["body"].state_dict())
    gn16().load_state_dict(PracticalGroupNorm(64, in_channels=64).state_dict())
    parts = messages(caplog, logging.WARNING)
    assert parts[0].startswith("1: 16 groups here") and parts[1].startswith("the norm: 16 groups here")


def test_weight_standardization_is_recorded(caplog):
    def ws():
        return GroupNorm(16, 64, weight_standardization=True)

    net(gn16).load_state_dict(net(ws).state_dict())
    (warning,) = messages(caplog, logging.WARNING)
    assert "body.1: 16 groups here, 16 groups and WS where" in warning
    caplog.clear()
    net(ws).load_state_dict(net(ws).state_dict())
    assert messages(caplog, logging.WARNING) == []


def folded(model):
    """Its norms as fold_weight_standardization leaves them."""
    for norm in (model["body"][1], model["body"][4]):
        norm.weight_standardization, norm.weight_standardization_folded = False, True
    return model


def test_the_record_of_a_folded_model_says_so(caplog):
    def ws():
        return GroupNorm(16, 64, weight_standardization=True)

    assert records_of(folded(net(gn16)).state_dict())["body.1"]["weight_standardized"] == "folded"
    net(gn16).load_state_dict(folded(net(gn16)).state_dict())  # the same without standardization
    folded(net(gn16)).load_state_dict(folded(net(gn16)).state_dict())
    assert messages(caplog, logging.WARNING) == []
    folded(net(gn16)).load_state_dict(net(ws).state_dict())  # raw weights, which nobody standardizes any more
    net(ws).load_state_dict(folded(net(gn16)).state_dict())
    warnings = messages(caplog, logging.WARNING)
    assert "16 groups and folded WS here, 16 groups and WS where" in warnings[0]
    assert "16 groups and WS here, 16 groups and folded WS where" in warnings[1]


class Unbound(nn.Module):
    """A PGN that meets its layer in the forward pass alone."""

    def __init__(self, n_in=64, **options):
        super().__init__()
        self.norm, self.conv = PracticalGroupNorm(64, **options), nn.Conv2d(n_in, 64, 1)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_an_unbound_norm_takes_its_groups_from_the_record(caplog):
    model, trained = Unbound(256), bind_norms(Unbound(256), torch.randn(1, 256, 4, 4))
    assert model.norm.num_groups is None
    model.load_state_dict(trained.state_dict())
    assert (model.norm.num_groups, model.norm.in_channels) == (64, 256)
    model(torch.randn(2, 256, 4, 4)).sum().backward()
    assert str(bind_norms(model, torch.randn(1, 256, 4, 4))) == str(trained)
    assert messages(caplog, logging.WARNING) == []


@pytest.mark.parametrize("norm", [gn16, lambda: GroupNorm(32, 64), lambda: PracticalGroupNorm(64, 64, gain_ratio=2)])
def test_a_record_that_pgn_would_not_give_is_a_warning_and_gives_way_to_the_layer(norm, caplog):
    trained = Unbound()
    trained.norm = norm()
    groups = trained.norm.num_groups
    assert groups > 1, "what PGN gives"
    model, x = Unbound(), torch.randn(2, 64, 4, 4)
    model.load_state_dict(trained.state_dict())
    (warning,) = messages(caplog, logging.WARNING)
    assert warning.startswith(f"norm: this PGN takes {groups} groups from the record of its weights")
    assert model.norm.num_groups == groups
    with torch.no_grad():
        assert torch.equal(model(x), trained(x))
    assert bind_norms(model, torch.randn(1, 64, 4, 4)).norm.num_groups == 1


@LOOK
def test_training_compares_what_a_record_gave_with_the_layer():
    model = Unbound()
    trained = nn.ModuleDict({"norm": gn16(), "conv": model.conv})
    model.load_state_dict(trained.state_dict())
    with pytest.raises(InputError, match=r"bound to the layer of a checkpoint's record, but .*num_groups=1, not 16"):
        model(torch.randn(2, 64, 4, 4))


def test_a_norm_with_ws_waits_for_its_layer(caplog):
    model, image = Unbound(weight_standardization=True), torch.randn(1, 64, 4, 4)
    model.load_state_dict(bind_norms(Unbound(weight_standardization=True), image).state_dict())
    assert not model.norm.is_bound() and messages(caplog, logging.WARNING) == []
    assert bind_norms(model, image).norm.is_bound() and type(model.conv) is WSConv2d


@pytest.mark.parametrize("here", [False, True])
def test_an_unbound_norm_compares_the_weight_standardization(here, caplog):
    trained = bind_norms(Unbound(weight_standardization=not here), torch.randn(1, 64, 4, 4))
    Unbound(weight_standardization=here).load_state_dict(trained.state_dict())
    (warning,) = messages(caplog, logging.WARNING)
    there, here = ("1 group", "a norm without groups") if here else ("1 group and WS", "1 group")
    assert warning.startswith(f"norm: {here} here, {there} where its weights were trained")


def test_a_norm_in_two_places_and_one_without_weights(caplog):
    shared = GroupNorm(16, 64)
    model = nn.ModuleList([shared, shared, GroupNorm(4, 64, affine=False)])
    theirs = nn.ModuleList([GroupNorm(8, 64), GroupNorm(8, 64), GroupNorm(8, 64, affine=False)])
    model.load_state_dict(theirs.state_dict())
    (warning,) = messages(caplog, logging.WARNING)
    assert warning.startswith("0: 16 groups here, 8 groups where")


def test_each_load_warns_once(caplog):
    ours, theirs = net(gn16), net(pgn)
    for count in range(1, 4):
        ours.load_state_dict(theirs.state_dict())
        assert len(messages(caplog, logging.WARNING)) == count


def test_the_record_says_what_the_norm_is():
    model = net(pgn)
    expected = {"num_groups": 1, "in_channels": 64, "weight_standardized": False}
    assert norm_record(model["body"][1]) == expected
    assert records_of(model.state_dict()) == {"body.1": expected, "body.4": expected}


def test_widths_that_are_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    """torch.load opens no others."""
    n_in, n_out = np.array([64, 16])
    given = PracticalGroupNorm(n_out, n_in)
    model = nn.Sequential(nn.Conv2d(n_in, n_out, 3), PracticalGroupNorm(n_out), nn.Conv2d(n_in, n_out, 3), given)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    records = records_of(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert [record["in_channels"] for record in records.values()] == [64, 64]
    json.dumps([dataclasses.asdict(row) for row in norm_table(model)])
