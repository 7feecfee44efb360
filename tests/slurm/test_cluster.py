"""Comparisons as jobs of a real Slurm, on this machine (cluster.py)."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import quick_models
import ready_process

from gng_d2.errors import InputError
from study.report import ComparisonRow
from study.rows import read_rows
from study.slurm import Slurm
from study.watch import StatusTable

sys.path.insert(0, os.path.dirname(__file__))
from cluster import cluster, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no {', '.join(missing())} here: apt install slurm-wlm munge"),
]

CONFIG = "configs/quick/pfpn_gn.yaml"
TINY = [*quick_models.TRAINING, "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "MODEL.DEVICE", "cpu"]
TINY += ["DATALOADER.NUM_WORKERS", "0"]

# Preempts one run, as a cluster would: by submitit's signal, in its third iteration, after a checkpoint
PREEMPT = """
import os, subprocess, time
from gng_d2.job.engine import Trainer
from study.slurm import Slurm

Slurm.pause = 0.5
step = Trainer.run_step

def run_step(self):
    step(self)
    mark = os.path.join(self.cfg.OUTPUT_DIR, "preempted")
    if "SLURM_JOB_ID" in os.environ and mark.endswith("PGN/seed_1/preempted") and self.iter == 2:
        if not os.path.exists(mark):
            open(mark, "w").close()
            # SLURM_JOB_ID may be the whole array's, as it is in one of its tasks
            job = os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"]
            subprocess.run(["scancel", "--signal=USR2", job], check=True)
            time.sleep(600)

Trainer.run_step = run_step
"""


@pytest.fixture(scope="module")
def slurm(shapes):
    with cluster() as environment:
        yield {**environment, "OMP_NUM_THREADS": "1"}


def compare(environment, output, norms, seeds, *options, overrides=TINY, tool="tools/compare.py"):
    given = ["--config-file", CONFIG, "--norms", *norms, "--seeds", *seeds, "--output", str(output), *options]
    return ready_process.run(tool, [*given, *overrides], **environment)


def printed(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


ON_SLURM = ("--cluster", "slurm", "--slurm-cpus", "1", "--slurm-time", "30")


def jobs(folder):
    return {str(path.parent): path.read_text() for path in Path(folder).glob("*/*/slurm_job")}


# The watching process, killed when it has submitted
KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, "tools")
from study.slurm import Slurm

start = Slurm.start

def start_and_die(self, runs):
    start(self, runs)
    os.kill(os.getpid(), signal.SIGKILL)

Slurm.start = start_and_die
runpy.run_path("tools/compare.py", run_name="__main__")
"""


def test_on_slurm_a_comparison_ends_with_the_table_of_this_machine(slurm, tmp_path):
    """With a run that is preempted while it trains, and a watching process that is killed and started again."""
    preempt, killed = tmp_path / "preempt.py", tmp_path / "killed.py"
    preempt.write_text(PREEMPT)
    killed.write_text(KILLED)
    given = ["GN", "PGN"], ["1"], "--import", str(preempt), "--parallel", "1"
    there, here = tmp_path / "slurm", tmp_path / "local"

    assert compare(slurm, there, *given, *ON_SLURM, tool=killed).returncode == -9
    submitted = jobs(there)
    assert len(submitted) == 2
    said = printed(compare(slurm, there, *given, *ON_SLURM))
    assert jobs(there) == submitted
    assert "PGN seed 1: queued" in said and "PGN seed 1: finished" in said

    printed(compare(slurm, here, *given))
    rows, expected = (
        [replace(row, machine="") for row in read_rows(folder / "results.json", ComparisonRow)]
        for folder in (there, here)
    )
    assert rows == expected and all(row.seeds == [1] for row in rows)
    assert (there / "PGN/seed_1/preempted").exists() and not (here / "PGN/seed_1/preempted").exists()
    assert all((there / "slurm" / f"{job}_0_log.err").exists() for job in submitted.values())
    assert "Starting training from iteration 2" in (there / "PGN/seed_1/log.txt").read_text()


def test_a_run_takes_two_machines(slurm, tmp_path):
    overrides = [*TINY, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"]
    printed(compare(slurm, tmp_path, ["PGN"], ["0"], "--num-machines", "2", *ON_SLURM, overrides=overrides))
    assert "World size: 2" in (tmp_path / "PGN/seed_0/log.txt").read_text()
    assert re.search(r"Rank of current process: 1", (tmp_path / "PGN/seed_0/log.txt.rank1").read_text())


def test_what_a_job_waits_for_is_said_and_a_cancelled_one_has_failed(slurm, tmp_path, monkeypatch, capsys):
    """In this process: compare's main."""
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Slurm, "pause", 0.2)
    words = ["--config-file", CONFIG, "--norms", "GN", "--seeds", "0", "--output", str(tmp_path), *ON_SLURM]
    monkeypatch.setattr("sys.argv", ["compare.py", *words, "--slurm-option", "begin=now+1hour", *TINY])
    said, show = [], StatusTable.show

    def show_and_cancel(table, states):
        show(table, states)
        if not said:
            said.append(capsys.readouterr().out)
            subprocess.run(["scancel", *jobs(tmp_path).values()], check=True)

    monkeypatch.setattr(StatusTable, "show", show_and_cancel)
    with pytest.raises(InputError, match="1 of 1 runs failed"):
        __import__("compare").main()
    assert said == ["GN seed 0: queued, Slurm says BeginTime\n"]
    assert re.search(r"GN seed 0: failed: job \d+ ended as CANCELLED", capsys.readouterr().out)
