import logging

import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode

import gng_d2
from gng_d2.errors import InputError
from gng_d2.job.build import build, build_on_meta
from gng_d2.job.config import check_config, check_solver, check_weight_file, check_weights, load_config, norm_keys

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
    assert norm == ours.MODEL.SEM_SEG_HEAD.NORM
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
    "empty": ("", "or a section such as MODEL is empty"),
    "empty section": ("MODEL:", "or a section such as MODEL is empty"),
    "circle": ("_BASE_: 'broken.yaml'", "leads back to itself"),
    "not yaml": ("MODEL: [1, 2", "cannot be used: while parsing a flow sequence"),
    "binary": (b"\x80\x02\xff", "cannot be used: 'utf-8' codec can't decode"),
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
    text = str(error.value)
    assert str(file) in text and text.count("config file") == 1 and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "name, message", [("nowhere.yaml", "nowhere.yaml does not exist"), ("", "--config-file"), ("model.py", "lazy")]
)
def test_missing_config_file(name, message):
    with pytest.raises(InputError, match=message):
        load_config(name)


def tags(path):
    return f"SOLVER:\n  BASE_LR: !!python/object/apply:os.mkdir ['{path}']\n"


@pytest.mark.parametrize("chain", ["itself", "base", "one of two bases", "behind the zoo's own"])
def test_a_config_with_python_tags_is_refused_and_not_run(chain, tmp_path):
    evil, file = tmp_path / "evil.yaml", tmp_path / "job.yaml"
    evil.write_text(tags(tmp_path / "ran"))
    (tmp_path / "good.yaml").write_text("SEED: 1")
    zoo = model_zoo.get_config_file("Base-RetinaNet.yaml")
    contents = {
        "itself": tags(tmp_path / "ran"),
        "base": "_BASE_: evil.yaml",
        "one of two bases": "_BASE_: [good.yaml, evil.yaml]",
        "behind the zoo's own": f"_BASE_: ['{zoo}', '{zoo}/../../../../../../../../../../../../..{evil}']",
    }
    file.write_text(contents[chain])
    name = "job.yaml" if chain == "itself" else "evil.yaml"
    with pytest.raises(InputError, match=rf"{name} has the Python tag !!python/object/apply:os.mkdir") as error:
        load_config(str(file))
    assert not (tmp_path / "ran").exists()
    assert len(str(error.value).splitlines()) == 1 and str(error.value).count("config file") == 1


def test_the_tag_of_detectron2s_model_zoo_is_read(tmp_path):
    sizes = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    assert len(sizes) == 5 and sizes[0][0] == 32 and sizes[0][1] == pytest.approx(32 * 2 ** (1 / 3))
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"_BASE_: {model_zoo.get_config_file('COCO-Detection/retinanet_R_50_FPN_1x.yaml')}\nSEED: 3")
    assert sizes == load_config(str(mine)).MODEL.ANCHOR_GENERATOR.SIZES
    copied = tmp_path / "copied.yaml"
    copied.write_text(open(model_zoo.get_config_file("Base-RetinaNet.yaml")).read())
    with pytest.raises(InputError, match="copied.yaml has the Python tag !!python/object/apply:eval"):
        load_config(str(copied))


def test_a_link_in_another_folder_is_no_model_zoo(tmp_path, monkeypatch):
    """What lies beside the zoo, or is linked from it, is judged by where it is."""
    package = tmp_path / "zoo"
    (package / "configs").mkdir(parents=True)
    (package / "configs_of_mine").mkdir()
    monkeypatch.setattr("detectron2.model_zoo.__file__", str(package / "__init__.py"))
    (package / "configs" / "ours.yaml").write_text("SEED: !!python/object/apply:int [3]")
    assert load_config(str(package / "configs" / "ours.yaml")).SEED == 3
    beside = package / "configs_of_mine" / "evil.yaml"
    beside.write_text(tags(tmp_path / "ran"))
    (package / "configs" / "link.yaml").symlink_to(beside)
    for file in (beside, package / "configs" / "link.yaml"):
        with pytest.raises(InputError, match="Python tag"):
            load_config(str(file))
    assert not (tmp_path / "ran").exists()


def test_a_trusted_config_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("GNG_D2_TRUST_FILES", "1")
    (tmp_path / "mine.yaml").write_text("SEED: !!python/object/apply:int [3]")
    assert load_config(str(tmp_path / "mine.yaml")).SEED == 3


def test_a_config_that_was_loaded_is_detectron2s(tmp_path):
    """What reads its files is not left in it: it is copied, pickled, and merged into."""
    cfg = quick()
    assert type(cfg) is CfgNode and "load_yaml_with_base" not in vars(cfg)
    assert cfg.clone() == cfg


@pytest.mark.parametrize(
    "overrides", [["MODEL.NOROM", "PGN"], ["VERSION.X", "3"], ["MODEL.FPN.NORM"], ["SOLVER.MAX_ITER", "many"]]
)
def test_bad_overrides(overrides):
    with pytest.raises(InputError, match=overrides[0]):
        load_config("configs/quick/pfpn_pgn.yaml", overrides)


def quick(*overrides):
    return load_config("configs/quick/pfpn_pgn.yaml", overrides)


def test_unknown_norm_names_its_key():
    with pytest.raises(InputError, match=r"^MODEL.FPN.NORM: unknown norm 'PNG'; did you mean 'PGN'"):
        build_on_meta(quick("MODEL.FPN.NORM", "PNG"))


def test_images_that_do_not_divide_among_processes():
    with pytest.raises(InputError, match="SOLVER.IMS_PER_BATCH 2 .* 3 processes"):
        check_config(quick("SOLVER.IMS_PER_BATCH", "2"), world_size=3)
    check_config(quick("SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_WORLD_SIZE", "2"), world_size=3)
    check_config(quick(), world_size=0)  # --num-gpus 0, which Detectron2 takes
    with pytest.raises(InputError, match="SOLVER.REFERENCE_WORLD_SIZE 8"):
        check_config(quick("SOLVER.REFERENCE_WORLD_SIZE", "8"))


@pytest.mark.parametrize("key", ["IMS_PER_BATCH", "MAX_ITER", "CHECKPOINT_PERIOD"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_of_steps_and_images_are_positive(key, value):
    """With IMS_PER_BATCH 0 Detectron2 waits for its first batch for ever."""
    with pytest.raises(InputError, match=f"SOLVER.{key} {value}: at least 1"):
        check_config(quick(f"SOLVER.{key}", value))


def test_an_unknown_device():
    with pytest.raises(InputError, match="MODEL.DEVICE 'gpu' is no device"):
        check_config(quick("MODEL.DEVICE", "gpu"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("SOLVER.LR_SCHEDULER_NAME WarmupCosine", "section SOLVER: ValueError: .*WarmupCosine"),
        ("SOLVER.LR_SCHEDULER_NAME WarmupCosineLR SOLVER.BASE_LR_END 5.", "section SOLVER: AssertionError"),
        ("SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_TYPE all", "section SOLVER: ValueError: 'all'"),
    ],
)
def test_a_training_that_detectron2_cannot_set_up(overrides, message):
    check_solver(quick())
    with pytest.raises(InputError, match=message):
        check_solver(quick(*overrides.split()))


def test_an_error_of_the_device_names_no_key():
    """All that differs from the defaults would be tried, on another device."""
    with pytest.raises(InputError) as error:
        build(quick("MODEL.DEVICE", "xla"))
    assert "xla" in str(error.value).lower() and "with its default" not in str(error.value)


def test_missing_weights(tmp_path):
    with pytest.raises(InputError, match=r"MODEL.WEIGHTS: the file .*nothing.pth does not exist"):
        check_weights(quick("MODEL.WEIGHTS", str(tmp_path / "nothing.pth")))
    with pytest.raises(InputError, match=r"^--weights: the file .*nothing.pth does not exist$"):
        check_weight_file(str(tmp_path / "nothing.pth"), "--weights")
    check_weights(quick("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"))


def test_frozen_batch_norm_without_weights_is_a_warning(caplog):
    check_weights(quick())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    check_weights(quick("MODEL.RESNETS.NORM", "FrozenBN"))
    assert "MODEL.RESNETS.NORM PGN" in caplog.text


def test_our_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(gng_d2.get_config_file("quick/pfpn_pgn.yaml")).MODEL.SEM_SEG_HEAD.NORM == "PGN"
    with pytest.raises(InputError, match="has no config 'none.yaml'. It has .*pfpn_pgn.yaml"):
        gng_d2.get_config_file("none.yaml")
