import runpy
import sys

import pytest

from study.comparison import Comparison


@pytest.fixture
def reproduce(monkeypatch, capsys):
    """Runs ``tools/reproduce.py`` with these words, in this process to save imports, and returns what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tools/reproduce.py", *map(str, words)])
        capsys.readouterr()
        runpy.run_path("tools/reproduce.py", run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def line_of():
    """The cells of that line in a Markdown table that begins with a text."""

    def cells(table, first):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} ")]
        return [cell.strip() for cell in line.strip("|").split("|")]

    return cells


# a training job that takes no time; some norms make it fail or be killed
JOB = """
import json, os, signal, sys
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder, seed, norm = given["OUTPUT_DIR"], int(given["SEED"]), given["MODEL.SEM_SEG_HEAD.NORM"]
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, "arguments"), "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if norm == "GN3":
    print("Traceback (most recent call last):\\n  File ...\\nValueError: it does not divide\\nDetails: none")
    sys.exit(1)
if norm == "GN5":
    os.kill(os.getpid(), signal.SIGKILL)
iterations, evaluated = int(given["SOLVER.MAX_ITER"]), given.get("DATASETS.TEST") != "()"
with open(os.path.join(folder, "metrics.json"), "a") as file:
    for record in (
        {"iteration": iterations - 1, "total_loss": 1.0 + seed, "time": 0.25},
        {"iteration": iterations, "bbox/AP": {"GN": 40.0, "PGN": 41.0}[norm] + seed, "bbox/APl": float("nan")},
    )[: 1 + evaluated]:
        file.write(json.dumps(record) + "\\n")
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    monkeypatch.setattr("study.comparison.TRAIN_NET", str(script))
    monkeypatch.setattr("study.local.Local.pause", 0.02)


@pytest.fixture
def small(tmp_path):
    """A comparison of the quick Panoptic FPN, by default with two norms and two seeds."""

    def make(norms=("GN", "PGN"), seeds=(0, 1), overrides=("SOLVER.MAX_ITER", "20"), **launch):
        output, keys = str(tmp_path / "out"), ["MODEL.SEM_SEG_HEAD.NORM"]
        return Comparison("configs/quick/pfpn_gn.yaml", norms, seeds, output, keys, overrides, **launch)

    return make
