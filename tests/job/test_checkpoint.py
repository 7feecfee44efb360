import copy
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import ready_process
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

import gng_d2
from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.checkpoint import Checkpointer, check_resumed, load_model
from gng_d2.job.config import load_config
from gng_d2.job.weight_files import save_weight_file
from gng_d2.layers.record import records_of

CONFIG = "configs/quick/pfpn_pgn.yaml"


def model(*overrides):
    return build_model(load_config(CONFIG, overrides))


def messages(caplog, level=logging.WARNING):
    return [r.message for r in caplog.records if r.name.startswith("gng_d2") and r.levelno == level]


def warnings_of_loading(model, path, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="gng_d2"):
        Checkpointer(model).load(str(path))
    return messages(caplog)


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
    assert message.startswith("2 GroupNorm layers (backbone.bottom_up.stem.conv1.norm and 1 more) took")
    assert "FREEZE_AT freezes 2 of them" in message and "MODEL.WEIGHTS" in message and "FREEZE_AT 0" in message


def test_group_norm_weights_and_batch_norm_models_are_no_warning(tmp_path, caplog):
    gn = caffe2_file(tmp_path / "R-18-GN.pkl", "gn")
    ours = model("MODEL.RESNETS.NORM", "PGN")
    assert warnings_of_loading(ours, gn, caplog) == []
    assert ours.backbone.bottom_up.stem.conv1.norm.weight[0] == 7
    bn = caffe2_file(tmp_path / "R-18.pkl", "bn")
    assert warnings_of_loading(model("MODEL.RESNETS.NORM", "FrozenBN"), bn, caplog) == []


def test_new_norms_behind_trained_layers_are_one_warning(tmp_path, caplog):
    """As where a detector of the zoo gets norms in its FPN, which was trained without any."""
    detector = model("MODEL.FPN.NORM", "")
    torch.save({"model": detector.state_dict()}, tmp_path / "detector.pth")
    caplog.set_level(logging.WARNING, logger="gng_d2")
    Checkpointer(model("MODEL.FPN.NORM", "GN1")).resume_or_load(str(tmp_path / "detector.pth"), resume=False)
    (message,) = [text for text in messages(caplog) if "trained without a norm" in text]
    assert message.startswith("8 norms (backbone.fpn_lateral2.norm and 7 more) are not in ")  # 2 at each of 4 levels
    caplog.clear()
    torch.save({"model": detector.backbone.bottom_up.state_dict()}, tmp_path / "backbone.pth")
    alone = model("MODEL.FPN.NORM", "GN1")
    Checkpointer(alone.backbone.bottom_up).resume_or_load(str(tmp_path / "backbone.pth"), resume=False)
    assert [text for text in messages(caplog) if "trained without a norm" in text] == []


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


def test_weights_of_a_model_of_which_torch_compile_wrapped_a_part(tmp_path):
    ours = nn.ModuleDict({"a": nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)}), "b": nn.Linear(2, 2)})
    torch.save({"model": nn.ModuleDict({"module": ours}).state_dict()}, tmp_path / "weights.pth")
    plain = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    wrapped = copy.deepcopy(ours)
    for other in (plain, wrapped):
        nn.init.zeros_(next(other.parameters()))
        Checkpointer(other).load(str(tmp_path / "weights.pth"))
        assert torch.equal(next(other.parameters()), next(ours.parameters()))


def test_weights_of_a_model_that_torch_compile_wrapped(tmp_path):
    ours = gng_d2.convert_norms(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), "GN1")
    torch.save({"model": nn.ModuleDict({"_orig_mod": ours}).state_dict()}, tmp_path / "weights.pth")
    other = nn.Sequential(nn.Conv2d(3, 8, 1), gng_d2.GroupNorm(1, 8))
    Checkpointer(other).load(str(tmp_path / "weights.pth"))
    assert torch.equal(other[0].weight, ours[0].weight)
    with pytest.raises(InputError, match="1: 1 group in the checkpoint, 2 groups here"):  # the record is found too
        Checkpointer(nn.Sequential(nn.Conv2d(3, 8, 1), gng_d2.GroupNorm(2, 8))).load(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("make", [dict, lambda weights: {"model": weights}])
@pytest.mark.parametrize("part", ["", "backbone.bottom_up."])
def test_a_pickle_of_arrays_under_the_models_names(make, part, tmp_path):
    """It has no "__author__", and Detectron2 would take its names for Caffe2's. Those of a part are found by their
    ends, as in a file of Caffe2."""
    if part and make is not dict:
        pytest.skip("what names its weights has their whole names")
    ours = model()
    weights = {name: tensor.numpy() + 1 for name, tensor in ours.state_dict().items() if name.startswith(part)}
    named = {name.removeprefix(part): array for name, array in weights.items()}
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(make(named)))
    Checkpointer(ours).load(str(tmp_path / "weights.pkl"))
    loaded = ours.state_dict()
    assert len(weights) > 20 and all(np.array_equal(loaded[name], array) for name, array in weights.items())


HEAD = "MODEL.SEM_SEG_HEAD.NORM"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of the quick model with PGN+WS in its semantic head."""
    folder = tmp_path_factory.mktemp("run")
    Checkpointer(model(HEAD, "PGN+WS"), str(folder)).save("model_final", iteration=7)
    return folder / "model_final.pth"


def test_a_checkpoint_records_its_norms_and_plain_detectron2_loads_it(trained):
    records = records_of(torch.load(trained, weights_only=True)["model"])
    assert records["sem_seg_head.p2.0.norm"] == {"num_groups": 8, "in_channels": 64, "weight_standardized": True}
    stem = records["backbone.bottom_up.stem.conv1.norm"]
    assert (stem["num_groups"], stem["weight_standardized"]) == (32, False)
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


def test_weights_of_another_shape_do_not_go_on(trained):
    def check(*overrides):
        check_resumed(build_on_meta(load_config(CONFIG, overrides)), torch.load(trained, weights_only=True), "a.pth")

    check("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.ROI_MASK_HEAD.NUM_CONV", "3")
    message = r"a.pth is of another model .*fpn_lateral2.weight \(\(64, 64, 1, 1\) there, \(32, 64, 1, 1\) here\)"
    with pytest.raises(InputError, match=message):
        check("MODEL.FPN.OUT_CHANNELS", "32")


def under_ddp(its_model, path):
    """A checkpoint with the names that DistributedDataParallel gives."""
    torch.save({"model": nn.ModuleDict({"module": its_model}).state_dict()}, path)
    return str(path)


def test_checkpoints_of_ddp_are_compared_too(tmp_path, caplog):
    theirs = under_ddp(model(HEAD, "PGN+WS"), tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=r"7 differ:\n  sem_seg_head.p2.0.norm: 8 groups and WS in the checkpoint"):
        Checkpointer(model(HEAD, "GN")).load(theirs)
    Checkpointer(model(HEAD, "PGN+WS")).load(theirs)
    batch_norms = under_ddp(model("MODEL.RESNETS.NORM", "BN"), tmp_path / "bn.pth")
    (message,) = warnings_of_loading(model("MODEL.RESNETS.NORM", "PGN"), batch_norms, caplog)
    assert message.startswith("20 GroupNorm layers")


def test_other_norms_are_a_warning_when_fine_tuned(trained, caplog):
    with caplog.at_level(logging.WARNING, logger="gng_d2"):
        Checkpointer(model(HEAD, "GN1")).resume_or_load(str(trained), resume=False)
    (message,) = messages(caplog)
    assert message.startswith("sem_seg_head.p2.0.norm: 1 group here, 8 groups and WS where its weights were trained")


def test_a_checkpoint_without_the_record_is_taken_as_it_is(trained, tmp_path, caplog):
    data = torch.load(trained)
    data["model"] = dict(data["model"])
    torch.save(data, tmp_path / "elsewhere.pth")
    other = model(HEAD, "GN1")
    with caplog.at_level(logging.INFO, logger="gng_d2"):
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
    with pytest.raises(InputError, match="the weights catalog://nothing/x cannot be fetched"):
        Checkpointer(torch.nn.Linear(2, 2)).load("catalog://nothing/x")


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InputError, match=f"weights: the file {tmp_path}/no.pth does not exist"):
        load_model(torch.nn.Linear(2, 2), f"{tmp_path}/no.pth")


def test_a_file_can_be_loaded_after_one_that_could_not(tmp_path):
    (tmp_path / "text.pth").write_bytes(b"Not found")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "good.pth")
    checkpointer = Checkpointer(torch.nn.Linear(2, 2))
    for _ in range(2):
        with pytest.raises(InputError, match=r"text.pth cannot be read"):
            checkpointer.load(str(tmp_path / "text.pth"))
    checkpointer.load(str(tmp_path / "good.pth"))
    assert not checkpointer.missing_keys


def test_weights_of_pycls_are_read_as_detectron2_reads_them(tmp_path):
    def net():
        return nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))})

    theirs, ours = net(), net()
    weights = theirs["stem"].state_dict()
    torch.save({"model_state": weights, "epoch": 3}, tmp_path / "net.pyth")
    Checkpointer(ours).load(str(tmp_path / "net.pyth"))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


@pytest.mark.parametrize("name", ["text.pth", "text.pkl", "cut.pth", "empty.pth", "zeros.pth", "other.pkl"])
def test_a_file_that_is_no_checkpoint_is_one_line_with_its_name(name, tmp_path):
    file = tmp_path / name
    if name == "cut.pth":
        torch.save({"model": {"a": torch.zeros(1000)}}, file)
        file.write_bytes(file.read_bytes()[:700])
    elif name == "other.pkl":
        file.write_bytes(pickle.dumps([1, 2, 3]))
    else:
        file.write_bytes({"text": b"Not found", "empty": b"", "zeros": bytes(5000)}[name.partition(".")[0]])
    before = file.read_bytes()
    with pytest.raises(InputError, match=rf"^{file} (cannot be read as|holds no) weights") as error:
        Checkpointer(torch.nn.Linear(2, 2)).load(str(file))
    assert len(str(error.value).splitlines()) == 1 and "weights_only" not in str(error.value)
    assert file.read_bytes() == before


def damaged(content, kind):
    if kind == "cut":
        return content[: len(content) * 2 // 3]
    if kind == "zeroed":
        return content[:1000] + bytes(4096) + content[5096:]
    if kind == "no end":
        return content[:-1]
    flipped = bytearray(content)
    flipped[{"first": 0, "middle": len(content) // 2}[kind]] ^= 16
    return bytes(flipped)


DAMAGE = ["cut", "zeroed", "no end", "first", "middle"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_recognized_and_not_resumed_from(kind, tmp_path, caplog):
    """torch.load reads some of these as if nothing were."""
    checkpointer = Checkpointer(torch.nn.Linear(30, 100), str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    torch.nn.init.ones_(checkpointer.model.weight)
    checkpointer.save("model_0000003", iteration=3)
    last = tmp_path / "model_0000003.pth"
    last.write_bytes(damaged(last.read_bytes(), kind))
    with pytest.raises(InputError, match="model_0000003.pth .*damaged"):
        checkpointer.read(str(last))
    with caplog.at_level(logging.WARNING):
        rest = Checkpointer(torch.nn.Linear(30, 100), str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 1
    assert f"Resuming from {tmp_path}/model_0000001.pth" in caplog.text and str(last) in caplog.text


def test_a_flipped_byte_in_weights_from_elsewhere_is_recognized(tmp_path):
    """By the checksums that torch.save writes and torch.load does not compare."""
    weight = torch.arange(1000.0)
    torch.save({"weight": weight}, tmp_path / "theirs.pth")
    content = bytearray((tmp_path / "theirs.pth").read_bytes())
    content[content.index(weight.numpy().tobytes()) + 2000] ^= 1
    (tmp_path / "theirs.pth").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "theirs.pth")["weight"], weight)
    with pytest.raises(InputError, match="theirs.pth is damaged"):
        Checkpointer(torch.nn.Linear(2, 2)).load(str(tmp_path / "theirs.pth"))


@pytest.mark.parametrize("names", ["", "model_0000007.pth", ".", "\0\0\0", b"\xff\xfe", None])
def test_a_useless_last_checkpoint_stops_nothing_where_whole_ones_are(names, tmp_path, caplog):
    checkpointer = Checkpointer(torch.nn.Linear(3, 1), str(tmp_path))
    for name, iteration in (("model_final", 2), ("model_0000005", 5)):  # MAX_ITER was raised after 2
        checkpointer.save(name, iteration=iteration)
    last = tmp_path / "last_checkpoint"
    last.unlink()
    if names is not None:
        last.write_bytes(names if isinstance(names, bytes) else names.encode())
    assert checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 5
    assert str(last) in caplog.text
    for file in tmp_path.glob("*.pth"):
        file.unlink()
    if names is not None:
        with pytest.raises(InputError, match=f"{last}.*no other checkpoint of {tmp_path} is whole"):
            checkpointer.resume_or_load("", resume=True)


def test_weights_beside_the_checkpoints_are_not_resumed_from(tmp_path):
    """Only what a trainer has saved has an iteration."""
    torch.save({"model": torch.nn.Linear(3, 1).state_dict()}, tmp_path / "model_final.pth")
    torch.save({"model": torch.nn.Linear(3, 1).state_dict(), "iteration": 3}, tmp_path / "model_best.pth")
    assert not Checkpointer(torch.nn.Linear(3, 1), str(tmp_path)).has_checkpoint()


class State:
    def __init__(self, steps=0):
        self.steps = steps

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


@pytest.mark.parametrize("lacks", ["iteration", "trainer"])
def test_weights_that_last_checkpoint_names_are_not_resumed_from(lacks, tmp_path, caplog):
    """Detectron2 resumes from them at iteration 1, with a fresh optimizer."""
    Checkpointer(torch.nn.Linear(3, 1), str(tmp_path), trainer=State(5)).save("model_0000005", iteration=5)
    content = torch.load(tmp_path / "model_0000005.pth")
    del content[lacks]
    torch.save(content, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    state = State()
    checkpointer = Checkpointer(torch.nn.Linear(3, 1), str(tmp_path), trainer=state)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == state.steps == 5
    assert f"{tmp_path}/model_final.pth holds weights alone" in caplog.text
    (tmp_path / "model_0000005.pth").unlink()
    with pytest.raises(InputError, match="holds weights alone.*no other checkpoint"):
        checkpointer.resume_or_load("", resume=True)


def test_a_checkpoint_replaces_another_whole_or_not_at_all(tmp_path, monkeypatch):
    checkpointer = Checkpointer(torch.nn.Linear(3, 1), str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    save = torch.save

    def full_disk(content, file):
        save(content, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match=rf"cannot write {tmp_path}/model_final.pth: No space left"):
        checkpointer.save("model_final", iteration=2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_twenty_kills_inside_checkpoint_writes_change_nothing(tmp_path):
    script = Path(__file__).with_name("kill_in_checkpoints.py")
    done = ready_process.run(script, [str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("20 kills")


@pytest.mark.parametrize("content", [{}, {"other.weight": torch.zeros(8)}, {"0.weight": torch.zeros(9, 3, 3, 3)}])
def test_weights_of_which_none_fits_are_an_error(content, tmp_path):
    save_weight_file(str(tmp_path / "a.pth"), {"model": content})
    with pytest.raises(
        InputError, match="a.pth holds no weight of this model: .*, (where the model has 0.weight|not )"
    ):
        Checkpointer(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))).load(str(tmp_path / "a.pth"))


def test_weights_of_half_precision_are_taken(tmp_path):
    ours, theirs = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1).half()
    torch.save({"model": theirs.state_dict()}, tmp_path / "weights.pth")
    Checkpointer(ours).load(str(tmp_path / "weights.pth"))
    assert torch.equal(ours.weight, theirs.weight.float())


def test_statistics_that_are_no_numbers_predict_nothing(tmp_path):
    batch_norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    batch_norm[1].running_var[2] = torch.nan
    torch.save({"model": batch_norm.state_dict()}, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="1.running_var"):
        load_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), str(tmp_path / "nan.pth"))


def test_weights_that_are_no_numbers_predict_nothing(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    weights = {name: tensor * float("nan") for name, tensor in model.state_dict().items()}
    save_weight_file(str(tmp_path / "a.pth"), {"model": weights})
    with pytest.raises(InputError, match="a.pth: weights are not finite: 0.weight, 0.bias"):
        load_model(model, str(tmp_path / "a.pth"))


@pytest.mark.parametrize("kind", ["integers", "booleans", "complex", "sparse", "meta"])
@pytest.mark.parametrize("resume_or_load", [False, True])
def test_weights_that_are_no_floating_point_numbers_are_an_error(kind, resume_or_load, tmp_path):
    """PyTorch would copy the first three without a word."""
    make = {
        "integers": lambda t: (t * 100).to(torch.int8),
        "booleans": lambda t: t > 0,
        "complex": lambda t: t + 1j,
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
    }[kind]
    ours = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    weights = {f"module.{name}": make(t) if name == "0.weight" else t for name, t in ours.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "weights.pth")
    load = Checkpointer(ours).resume_or_load if resume_or_load else Checkpointer(ours).load
    with pytest.raises(InputError, match=r"weights.pth holds module.0.weight as torch\.\w+.* floating-point"):
        load(str(tmp_path / "weights.pth"))
