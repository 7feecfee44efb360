import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode

from gng_d2.config import (
    check_config,
    check_datasets,
    check_output_dir,
    check_weights,
    load_config,
    norm_keys,
)
from gng_d2.errors import InputError

NORMS = {"gn": "GN", "gn1": "GN1", "pgn": "PGN"}


def differences(a, b, prefix=""):
    for key in sorted({*a, *b}):
        if isinstance(a.get(key), CfgNode) and isinstance(b.get(key), CfgNode):
            yield from differences(a[key], b[key], f"{prefix}{key}.")
        elif a.get(key) != b.get(key):
            yield f"{prefix}{key}"


@pytest.mark.parametrize("name, norm", NORMS.items())
def test_table_5_is_detectron2s_panoptic_fpn_but_for_the_norm(name, norm):
    theirs = model_zoo.get_config("COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml")
    theirs.MODEL.DEVICE = "cpu"
    ours = load_config(f"configs/pfpn_{name}.yaml")
    assert ours.MODEL.SEM_SEG_HEAD.NORM == norm
    expected = {"OUTPUT_DIR"} if norm == "GN" else {"OUTPUT_DIR", "MODEL.SEM_SEG_HEAD.NORM"}
    assert set(differences(ours, theirs)) == expected


@pytest.mark.parametrize("folder", ["", "quick/"])
def test_setups_of_table_5_differ_in_the_norm_alone(folder):
    gn, *others = [load_config(f"configs/{folder}pfpn_{name}.yaml") for name in NORMS]
    for other in others:
        assert set(differences(gn, other)) == {"OUTPUT_DIR", "MODEL.SEM_SEG_HEAD.NORM"}


def test_zoo_names_are_found_and_overridden():
    cfg = load_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.FPN.NORM", "PGN"])
    assert dict(norm_keys(cfg))["MODEL.FPN.NORM"] == "PGN"
    check_config(cfg)


BROKEN = {
    "empty": ("", "no YAML config"),
    "circle": ("_BASE_: 'broken.yaml'", "leads back to itself"),
    "not yaml": ("MODEL: [1, 2", "no YAML config"),
    "binary": (b"\x80\x02\xff", "no YAML config"),
    "no mapping": ("just words", "broken.yaml"),
    "unknown key": ("MODEL:\n  NOROM: PGN", "MODEL.NOROM"),
    "wrong type": ("SOLVER:\n  MAX_ITER: many", "MAX_ITER"),
    "missing base": ("_BASE_: 'nowhere.yaml'", "nowhere.yaml"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_config_file(name, tmp_path):
    content, message = BROKEN[name]
    file = tmp_path / "broken.yaml"
    file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_config(str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "name, message", [("nowhere.yaml", "nowhere.yaml does not exist"), ("", "--config-file"), ("model.py", "lazy")]
)
def test_missing_config_file(name, message):
    with pytest.raises(InputError, match=message):
        load_config(name)


@pytest.mark.parametrize(
    "overrides", [["MODEL.NOROM", "PGN"], ["VERSION.X", "3"], ["MODEL.FPN.NORM"], ["SOLVER.MAX_ITER", "many"]]
)
def test_bad_overrides(overrides):
    with pytest.raises(InputError, match=overrides[0]):
        load_config("configs/quick/pfpn_pgn.yaml", overrides)


def quick(*overrides):
    return load_config("configs/quick/pfpn_pgn.yaml", overrides)


def test_unknown_norm_names_its_key():
    with pytest.raises(InputError, match=r"MODEL.FPN.NORM: unknown norm 'PNG'; did you mean 'PGN'"):
        check_config(quick("MODEL.FPN.NORM", "PNG"))


def test_images_that_do_not_divide_among_processes():
    with pytest.raises(InputError, match="SOLVER.IMS_PER_BATCH 2 .* 3 processes"):
        check_config(quick("SOLVER.IMS_PER_BATCH", "2"), world_size=3)
    check_config(quick("SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_WORLD_SIZE", "2"), world_size=3)
    check_config(quick(), world_size=0)  # --num-gpus 0, which Detectron2 takes
    with pytest.raises(InputError, match="SOLVER.REFERENCE_WORLD_SIZE 8"):
        check_config(quick("SOLVER.REFERENCE_WORLD_SIZE", "8"))


def test_datasets_that_are_not_there(shapes):
    check_datasets(quick())
    with pytest.raises(InputError, match=rf"DATASETS.TRAIN.*coco_2017_train.*{shapes}.*DETECTRON2_DATASETS"):
        check_datasets(quick("DATASETS.TRAIN", "('coco_2017_train',)"))
    check_datasets(quick("DATASETS.TRAIN", "('coco_2017_train',)"), eval_only=True)
    with pytest.raises(InputError, match="DATASETS.TEST: no dataset named 'coco_2017_vall'.*'coco_2017_val'"):
        check_datasets(quick("DATASETS.TEST", "('coco_2017_vall',)"))


def test_panoptic_evaluation_without_panopticapi_is_refused_before_training(shapes, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="panopticapi-lite"):
        check_datasets(quick())


def test_missing_weights(tmp_path):
    with pytest.raises(InputError, match=r"MODEL.WEIGHTS: the file .*nothing.pth does not exist"):
        check_weights(quick("MODEL.WEIGHTS", str(tmp_path / "nothing.pth")))
    check_weights(quick("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"))


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="OUTPUT_DIR: cannot write to .*file"):
        check_output_dir(quick("OUTPUT_DIR", str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


def test_frozen_batch_norm_without_weights_is_a_warning(caplog):
    check_weights(quick())
    assert not caplog.records
    check_weights(quick("MODEL.RESNETS.NORM", "FrozenBN"))
    assert "MODEL.RESNETS.NORM PGN" in caplog.text
