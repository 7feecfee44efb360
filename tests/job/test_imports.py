"""--import: a user's code runs first, once, in our process and in those that a job starts."""

import re
import sys
from pathlib import Path

import pytest
import quick_models
import ready_process
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from gng_d2.errors import InputError
from gng_d2.job.config import load_config
from gng_d2.job.imports import import_modules
from study.comparison import Comparison
from study.local import Local
from study.metrics import last_record
from study.watch import train_all

CONFIG = "configs/quick/pfpn_gn.yaml"
TINY = [
    *quick_models.TRAINING,
    "SOLVER.MAX_ITER",
    "2",
]


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Writes a user's file, which is forgotten with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    written = []

    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        written.append(name)
        return str(path)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_a_file_runs_once_and_finds_its_neighbours(user, capsys):
    user("gng_neighbour", "VALUE = 3")
    path = user("gng_user", "from gng_neighbour import VALUE\nprint('runs with', VALUE)")
    import_modules([path, path])
    import_modules([path])
    assert capsys.readouterr().out == "runs with 3\n"
    assert sys.modules["gng_user"].VALUE == 3


def test_a_module_by_its_name(user, tmp_path, capsys):
    user("gng_user", "print('runs')")
    sys.path.append(str(tmp_path))
    import_modules(["gng_user", "gng_user"])
    assert capsys.readouterr().out == "runs\n"


def test_what_cannot_be_imported_is_named(tmp_path):
    with pytest.raises(InputError, match="--import: the file .*/none.py does not exist"):
        import_modules([str(tmp_path / "none.py")])
    with pytest.raises(InputError, match="no module 'MODEL.FPN.NORM'.*KEY VALUE pairs must not follow it"):
        import_modules(["MODEL.FPN.NORM"])
    (tmp_path / "my.data.py").touch()
    with pytest.raises(InputError, match="Python cannot import .*my.data.py, because its name has a dot. Rename"):
        import_modules([str(tmp_path / "my.data.py")])
    path = tmp_path / "json.py"
    path.touch()
    with pytest.raises(InputError, match="has the name of another module, 'json'.*Rename the file"):
        import_modules([str(path)])


def test_a_package_in_the_working_folder(user, tmp_path, monkeypatch):
    """By its name, as a program in this folder finds it. Its files alone cannot import each other."""
    package = tmp_path / "gng_package"
    package.mkdir()
    (package / "__init__.py").write_text("from . import data")
    (package / "data.py").write_text("from .other import VALUE")
    (package / "other.py").write_text("VALUE = 3")
    monkeypatch.chdir(tmp_path)
    for name in ("__init__", "data"):
        with pytest.raises(InputError, match=f"{name}.py is a part of a package.*folder above the package"):
            import_modules([str(package / f"{name}.py")])
    import_modules(["gng_package", "gng_package.data"])
    assert sys.modules["gng_package"].data.VALUE == 3
    for name in [name for name in sys.modules if name.startswith("gng_package")]:
        del sys.modules[name]


def test_keys_of_a_users_project(user, tmp_path, monkeypatch):
    """The file that the page on own data shows."""
    page = Path("docs/own-data.md").read_text()
    (shown,) = re.findall(r"^```{code-block} python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    config = tmp_path / "own.yaml"
    config.write_text("MODEL: {MYNET: {NORM: PGN}}")
    for given in ((str(config),), (CONFIG, ["MODEL.MYNET.NORM", "GN"])):
        with pytest.raises(InputError, match=r"MODEL.MYNET.*a file that --import runs adds them to detectron2.config"):
            load_config(*given)
    user("my_project", "def add_my_config(cfg):\n    cfg.MODEL.MYNET = type(cfg)({'NORM': 'GN'})\n")
    monkeypatch.setattr("detectron2.config.defaults._C", get_cfg())
    import_modules([user("gng_user", shown)])
    assert load_config(str(config)).MODEL.MYNET.NORM == "PGN"


def test_errors_of_a_users_code_are_their_own(user, tmp_path):
    path = user("gng_user", "import not_installed_anywhere")
    for _ in range(2):  # and leave nothing half imported
        with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
            import_modules([path])
    sys.path.append(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        import_modules(["gng_user"])


BACKBONE = """
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import build_resnet_backbone

@BACKBONE_REGISTRY.register()
def my_backbone(cfg, input_shape):
    return build_resnet_backbone(cfg, input_shape)
"""


@pytest.mark.slow
def test_a_tool_takes_a_users_backbone(user):
    def analyze(*words):
        given = [
            "--config-file",
            CONFIG,
            "MODEL.META_ARCHITECTURE",
            "SemanticSegmentor",
            "MODEL.BACKBONE.NAME",
            "my_backbone",
            "MODEL.SEM_SEG_HEAD.IN_FEATURES",
            "('res2',)",
        ]
        return ready_process.run("tools/analyze_groups.py", [*words, *given])

    assert "my_backbone" in analyze().stderr
    done = analyze("--import", user("gng_user", BACKBONE))
    assert done.returncode == 0, done.stderr
    assert "res5.1.conv2" in done.stdout


DATASET = """
from detectron2.data import DatasetCatalog, MetadataCatalog

def load():
    return DatasetCatalog.get("gng_shapes_train_separated")

DatasetCatalog.register("gng_users_images", load)
MetadataCatalog.get("gng_users_images").set(
    **{k: v for k, v in MetadataCatalog.get("gng_shapes_train_separated").as_dict().items() if k != "name"}
)
"""


@pytest.mark.slow
def test_the_two_processes_of_a_comparisons_run_have_it_too(shapes, user, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = user("gng_user", DATASET)
    overrides = [*TINY, "DATASETS.TRAIN", "('gng_users_images',)"]
    output = str(tmp_path / "out")
    comparison = Comparison(CONFIG, ["PGN"], [0], output, overrides=overrides, imports=[path], num_gpus=2)
    try:
        (run,) = train_all(Local(comparison))
        state = comparison.state(run)
        assert state.status == "finished" and state.machine.startswith("2 x "), state
        assert "World size: 2" in Path(run.path("log.txt")).read_text()
        assert {"panoptic_seg/PQ", "bbox/AP"} <= last_record(run.path("metrics.json")).keys()
        assert load_config(run.path("config.yaml")).DATASETS.TRAIN == ("gng_users_images",)
    finally:
        DatasetCatalog.remove("gng_users_images")
