"""The walls of the house: who may import whom, and a wheel that needs nothing of the checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = Path("gng_d2")
STUDY = Path("tools/study")


def imports(path):
    """The modules that a file of the package names in its imports, in full: functions' own imports too."""
    parents = path.with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(parents[: len(parents) - node.level]) if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def below(module, *packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_imports_are_read_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("a/b/c.py")
    file.parent.mkdir(parents=True)
    file.write_text(
        "import x.y\nfrom .d import e\nfrom ..f import g\nfrom .. import h\ndef i():\n    from z import k\n"
    )
    assert set(imports(file)) == {"x.y", "a.b.d", "a.b.d.e", "a.f", "a.f.g", "a", "a.h", "z", "z.k"}


# each stands on those before it alone
WINGS = ["errors", "groups", "gains", "ops", "layers", "models", "job", "predict"]
NEED_DETECTRON2 = [*PACKAGE.glob("job/**/*.py"), *PACKAGE.glob("predict/*.py")]
NEED_DETECTRON2 += [PACKAGE / "layers" / "ws_conv.py", PACKAGE / "layers" / "norm_names.py"]


def names_of(modules, found):
    """Those of ``modules`` that ``found`` names, itself or by something in it."""
    return {name if name in modules else name.rpartition(".")[0] for name in found} & set(modules)


def modules_of(package):
    """Path of each module by its name in full."""
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in package.rglob("*.py")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_who_may_import_whom(path):
    found = set(imports(path))
    assert not [m for m in found if below(m, "study", "tools")], "the product knows nothing of the study"
    if path not in NEED_DETECTRON2:
        assert not [m for m in found if below(m, "detectron2", "fvcore", "yacs", "omegaconf")]
    wing = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if wing in WINGS:
        below_it = [f"gng_d2.{name}" for name in WINGS[: WINGS.index(wing) + 1]]
        assert all(below(m, *below_it) for m in found if m.startswith("gng_d2.")), (
            f"{wing} stands below what it imports"
        )
    else:
        assert path == PACKAGE / "__init__.py"


def circle(modules):
    """A circle of imports among ``modules``, functions' own imports too; [] if there is none."""
    graph = {name: names_of(modules, imports(path)) for name, path in modules.items()}
    for name, needed in graph.items():  # a module finds its own package half loaded, as it is meant to
        needed -= {name, *(package for package in modules if name.startswith(f"{package}."))}
    while graph:
        leaves = [name for name, needed in graph.items() if not needed & graph.keys()]
        if not leaves:
            return sorted(graph)
        for name in leaves:
            del graph[name]
    return []


def test_there_is_no_circle_of_imports(tmp_path, monkeypatch):
    assert circle(modules_of(PACKAGE)) == []
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    for name, text in {
        "__init__": "",
        "b": "from .c import d",
        "c": "def e():\n    import a.f",
        "f": "from a import b",
    }.items():
        Path("a", f"{name}.py").write_text(text)
    assert circle(modules_of(Path("a"))) == ["a.b", "a.c", "a.f"]


@pytest.mark.parametrize("path", ["tests/versions.py", "tools/make_venv.py", "tools/command_line.py"])
def test_what_makes_environments_needs_none(path):
    """CI starts it with a Python that has ``tabulate`` alone."""
    tops = [node for node in ast.parse(Path(path).read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tops if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "tabulate", "command_line"}


def test_importing_the_package_loads_neither_the_job_nor_predict():
    program = "import sys, gng_d2; print([m for m in sys.modules if m.startswith(('gng_d2.job', 'gng_d2.predict'))])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_make_gpu_runs_needs_no_detectron2():
    marked = {path for path in Path("tests").rglob("test_*.py") if re.search(r"mark\.gpu\b", path.read_text())}
    assert marked - {Path(__file__).relative_to(Path.cwd())} <= {*Path("tests/ops").glob("*.py")}
    needed = [STUDY / f"{name}.py" for name in ("kernel_tests", "norm_cost", "goals", "rule", "rows", "timing")]
    for path in (*Path("tests/ops").glob("*.py"), *needed, STUDY / "detector_norms.py"):
        assert not [m for m in imports(path) if below(m, "detectron2", "gng_d2.job.config", "study.step_cost")], path


IN_AN_EMPTY_FOLDER = """
import os, pkgutil, sys
checkout, installed = sys.argv[1:3]
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(args[0]))
import gng_d2
for module in pkgutil.walk_packages(gng_d2.__path__, "gng_d2."):
    if not module.name.endswith(("__main__", "_cpu_kernels")):
        __import__(module.name)
ours = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "gng_d2" and m.__file__]
assert all(file.startswith(installed) for file in ours), ours
from detectron2.engine import default_argument_parser
from gng_d2.job.engine import run_job
from gng_d2.job.config import load_any_config
from gng_d2.job.model_zoo import get_config_file
config = get_config_file("quick/pfpn_pgn.yaml")
assert load_any_config(get_config_file("pfpn_pgn.py")).model.sem_seg_head.norm == "PGN"
try:
    get_config_file("none.py")
except ValueError as error:
    listed = str(error).partition("It has ")[2].split(", ")
    assert {"pfpn_pgn.py", "pfpn_pgn.yaml", "quick/pfpn_pgn.yaml"} < {*listed} and "examples/own_data.py" not in listed
run_job(default_argument_parser().parse_args(["--config-file", config, "OUTPUT_DIR", "out", *sys.argv[3:]]))
assert os.path.exists("out/model_final.pth")
within = [path for path in map(str, opened) if os.path.abspath(path).startswith(checkout + os.sep)]
within = [path for path in within if f"{os.sep}.venv{os.sep}" not in path]
assert not within, within
print("trained", gng_d2.ideal_num_groups(784, 512))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made of a copy: setuptools leaves its traces where it builds. Its tests run in one process, so that it
    is made once."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("gng_d2", "configs"):
        shutil.copytree(name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"gng_d2"}
    configs = {str(path) for path in Path("configs").rglob("*") if path.suffix in (".yaml", ".py")}
    assert configs == {name.removeprefix("gng_d2/") for name in names if name.startswith("gng_d2/configs/")}


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_is_for_every_python_3_and_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    library = [name for name in archive.namelist() if name.endswith(".so")]
    assert library in ([], ["gng_d2/ops/_cpu_kernels.so"])
    assert re.match(r"gng_d2-[\d.]+-py3-none-" + ("linux_" if library else "any"), wheel.name)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    assert Path("README.md").read_text() in metadata and "Project-URL: Paper" in metadata


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_trains_in_an_empty_folder(wheel, shapes, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    small = (
        "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 64 SOLVER.MAX_ITER 1 DATASETS.TEST () DATALOADER.NUM_WORKERS 0"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_AN_EMPTY_FOLDER, os.getcwd(), str(installed), *small.split()],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "trained 68.0", done.stdout[-2000:] + done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("beside_a_clone", [False, True])
def test_the_wheel_works_without_detectron2(beside_a_clone, wheel, tmp_path):
    if beside_a_clone:
        (tmp_path / "detectron2" / "detectron2").mkdir(parents=True)
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    program = (
        "import sys; sys.modules['detectron2'] = None; import importlib.util as u; find = u.find_spec\n"
        "from importlib.machinery import PathFinder\n"
        "here = lambda name: PathFinder.find_spec(name, ['.'])\n"
        "u.find_spec = lambda name, *a: here(name) if name.startswith('detectron2') else find(name, *a)\n"
        "import gng_d2, torch\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64))\n"
        "print(gng_d2.norm_table(gng_d2.convert_norms(model)))\n"
        "print(gng_d2.get_config_file('quick/pfpn_pgn.yaml'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and str(tmp_path / "installed") in done.stdout.splitlines()[-1], done.stderr
