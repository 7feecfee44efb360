"""tools/gpu.py: every part at its smallest size on the CPU, and what becomes of those that cannot run."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from study import page as pages

gpu = importlib.import_module("gpu")
RESULTS = {part.experiment: part.result for part in gpu.PARTS}


@pytest.mark.slow
def test_every_part_on_the_cpu_and_the_page_of_it(tmp_path):
    """Without what the other tests and tools need, as on a machine with a GPU and few packages."""
    for name in ("scipy", "hypothesis", "expecttest", "timm", "segmentation_models_pytorch"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    results = tmp_path / "results"
    command = [sys.executable, "-W", "ignore", "tools/gpu.py", "--device", "cpu", "--output", str(results)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    environment["PYTEST_ADDOPTS"] = (
        "-p no:hypothesispytest -k test_weight_standardization"  # all files are collected, one runs
    )
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [f"{name}: finished" in done.stdout for name in RESULTS] == [True] * 4, done.stdout[-1000:]
    assert re.search(r"\| a training step with PGN no slower .* \| (yes|no) ", done.stdout)
    outcomes = {row["outcome"] for row in json.loads((results / "kernel_tests_cpu.json").read_text())}
    assert "passed" in outcomes and outcomes <= {"passed", "skipped"}

    for name in RESULTS.values():  # as the page reads those of a GPU
        shutil.move(results / f"{name}_cpu.json", results / f"{name}_cuda.json")
    page = pages.page(str(tmp_path))
    assert page.count("`python tools/gpu.py`, on ") == len(RESULTS)
    assert page.count("| goal ") == 2 and "The rule chose the faster op on " in page


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """Runs the tool; returns its exit status and what it printed last."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tools/gpu.py", "--device", "cpu", "--output", str(tmp_path), *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as stopped:
            gpu.main()
        return int(stopped.value.code), capsys.readouterr().out.split("\n\n")[-1]

    return run


def test_what_is_missing_is_named_and_the_others_run(main, monkeypatch):
    given = {}
    monkeypatch.setattr(gpu, "missing", lambda modules: [name for name in modules if name == "detectron2"])
    monkeypatch.setattr(gpu, "run", lambda part, path, *rest: given.update({part.experiment: rest}) or "finished")
    status, printed = main("--minutes", "9")
    assert status == 0 and [*given] == ["kernel-tests", "norm-cost"]
    for name in ("step-cost", "memory"):
        assert f"{name}: NOT RUN: needs detectron2\n" in printed


def test_each_part_has_a_share_of_the_time_that_is_left(main, monkeypatch):
    clock = [0.0]
    given = []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])

    def run(part, path, device, seconds):
        given.append(seconds)
        clock[0] += min(seconds, 100)
        return "finished"

    monkeypatch.setattr(gpu, "run", run)
    main("--minutes", "10")
    assert given == pytest.approx([180, 250, 280, 300])


def test_a_part_that_fails_stops_no_other_and_is_the_exit_status(main, monkeypatch):
    ran = []
    monkeypatch.setattr(
        gpu, "run", lambda part, *rest: ran.append(part.experiment) or ["failed", "cut off"][len(ran) > 1]
    )
    status, printed = main()
    assert status == 1 and ran == list(RESULTS)
    assert "kernel-tests: failed\n" in printed and "memory: cut off; the same command goes on\n" in printed


def test_anew_forgets_what_was_measured(main, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "run", lambda part, path, *rest: str(os.path.exists(path)))
    monkeypatch.setattr(gpu, "report", lambda paths: "")
    for name in RESULTS.values():
        (tmp_path / f"{name}_cpu.json").write_text("[]")
    assert "norm-cost: True" in main()[1]
    assert "norm-cost: False" in main("--anew")[1]


EXPERIMENT = """
import json, os, sys, time
name, words = sys.argv[1], sys.argv[2:]
with open(words[words.index("--json") + 1], "w") as file:
    json.dump({"words": words, "interpret": os.environ.get("TRITON_INTERPRET")}, file)
if name == "fails":
    sys.exit(1)
if name != "ends":
    time.sleep(60)
"""


@pytest.mark.parametrize("name, became", [("ends", "finished"), ("fails", "failed"), ("lasts", "cut off")])
def test_a_part_is_a_process_that_ends_with_its_time(name, became, tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "reproduce.py").write_text(EXPERIMENT)
    monkeypatch.setattr(gpu, "ROOT", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "rows.json"
    part = gpu.Part(name, "rows", (), 1.0, "--on-cuda", "--on-cpu")
    assert gpu.run(part, str(path), "cuda", 30 if name != "lasts" else 2) == became
    written = json.loads(path.read_text())
    assert written == {"words": ["--device", "cuda", "--json", str(path), "--on-cuda"], "interpret": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/gpu.py"])
    with pytest.raises(SystemExit, match="error: a CUDA GPU was not found .*--device cpu"):
        gpu.main()
