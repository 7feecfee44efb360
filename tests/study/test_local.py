"""Runs on this machine, side by side; processes that end with their parent; and the table of how runs stand."""

import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gng_d2.errors import InputError
from study.comparison import RunState
from study.local import Local, shares
from study.processes import Process
from study.watch import StatusTable, train_all

# by a job that does what its norm says, in no time


def train(cluster):
    """The states of the runs in the order in which they ended."""
    cluster.pause = 0.01
    ended = list(train_all(cluster))
    return [(str(run), cluster.states()[run].status) for run in ended]


def calls(comparison):
    return [len(Path(run.path("arguments")).read_text().splitlines()) for run in comparison.runs]


def test_what_finished_is_not_run_again_and_what_failed_is(job, small):
    comparison = small(["GN", "GN3", "GN5", "PGN"], [0])
    failed = [("GN3 seed 0", "failed"), ("GN5 seed 0", "failed")]
    assert train(Local(comparison)) == [("GN seed 0", "finished"), *failed, ("PGN seed 0", "finished")]
    assert train(Local(comparison)) == failed
    assert calls(comparison) == [1, 2, 2, 1]
    reasons = [comparison.state(run).reason for run in comparison.runs]
    assert reasons == [None, "ValueError: it does not divide", "killed by SIGKILL (out of memory?)", None]


def test_runs_are_jobs_of_the_given_size_that_differ_in_norm_and_seed(job, small):
    comparison = small(num_gpus=2, num_machines=2)
    train(Local(comparison, machine_rank=1, dist_url="tcp://first:1"))
    for run in comparison.runs:
        assert Path(run.path("arguments")).read_text().split() == [
            *("--resume", "--config-file", comparison.config_file, "--num-gpus", "2", "--num-machines", "2"),
            *("--machine-rank", "1", "--dist-url", "tcp://first:1", "SOLVER.MAX_ITER", "20"),
            *(comparison.keys[0], run.norm, "SEED", str(run.seed), "OUTPUT_DIR", run.folder),
        ]
    assert comparison.state(comparison.runs[0]).status == "not finished"  # the first machine writes what is shared


@pytest.mark.parametrize(
    "machines, arguments, message",
    [
        (2, {}, "give --dist-url"),
        (2, {"dist_url": "tcp://first:1", "parallel": 2}, "--parallel: several machines"),
        (1, {"machine_rank": 1}, "--machine-rank 1: 0 to 0, see --num-machines"),
        (2, {"machine_rank": -1, "dist_url": "tcp://first:1"}, "--machine-rank -1: 0 to 1"),
    ],
)
def test_bad_arguments_are_refused(machines, arguments, message, small):
    with pytest.raises(InputError, match=message):
        Local(small(num_machines=machines), **arguments)


def test_runs_side_by_side_record_their_own_threads(job, small, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    comparison = small(["GN", "PGN"], [0])
    train(Local(comparison, parallel=3))
    assert [comparison.state(run).machine.partition(" of")[0] for run in comparison.runs] == ["2 threads"] * 2


def test_a_file_system_without_locks_trains_too(job, small, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    assert [status for _, status in train(Local(small(["GN"])))] == ["finished", "finished"]


def test_a_run_that_another_process_has_is_left_alone(job, small):
    comparison = small()
    os.makedirs(comparison.runs[1].folder)
    with open(comparison.runs[1].path("lock.0"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        others = [(str(comparison.runs[i]), "finished") for i in (0, 2, 3)]
        assert sorted(train(Local(comparison))) == sorted([(str(comparison.runs[1]), "left"), *others])
    assert train(Local(comparison)) == [(str(comparison.runs[1]), "finished")]


# a job that waits until there are two
TOGETHER = """
import os, sys, time
from pathlib import Path
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder = Path(given["OUTPUT_DIR"])
here = folder.parents[1]
(here / f"here.{os.getpid()}").write_text("")
end = time.monotonic() + 60
while len(list(here.glob("here.*"))) < 2 and time.monotonic() < end:
    time.sleep(0.01)
(folder / "metrics.json").write_text('{"iteration": 20, "total_loss": 1.0}')
(folder / "found").write_text(f"{len(list(here.glob('here.*')))} {os.environ['OMP_NUM_THREADS']}")
time.sleep(0.1)
os.remove(here / f"here.{os.getpid()}")
"""


def test_runs_side_by_side_share_the_threads(small, tmp_path, monkeypatch):
    script = tmp_path / "job.py"
    script.write_text(TOGETHER)
    monkeypatch.setattr("study.comparison.TRAIN_NET", str(script))
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    comparison = small(["GN", "PGN"], [0])
    assert {status for _, status in train(Local(comparison, parallel=2))} == {"finished"}
    assert "2 3" in [Path(run.path("found")).read_text() for run in comparison.runs]


def test_runs_side_by_side_share_the_gpus_that_are_visible(small, monkeypatch):
    comparison = small(num_gpus=2)
    comparison.cfg.MODEL.DEVICE = "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-a,3,2")
    assert shares(comparison, 1) == [{}]
    assert shares(comparison, 2) == [{"CUDA_VISIBLE_DEVICES": "7,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-a,3"}]
    with pytest.raises(InputError, match="--parallel 3 with --num-gpus 2 needs 6 GPUs, and there are 5: 7,5,GPU-a,3,2"):
        shares(comparison, 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert shares(comparison, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]


# processes

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_an_interrupted_command_leaves_no_process(tmp_path):
    with pytest.raises(KeyboardInterrupt), Process(SLEEP, str(tmp_path / "output")) as process:
        wait_for(lambda: process.printed() == "up\n")
        raise KeyboardInterrupt
    assert process.poll() == -signal.SIGKILL


def test_a_command_ends_with_its_parent(tmp_path):
    """This parent has threads and is killed."""
    parent = f"""
import sys, threading, time
sys.path.insert(0, "tools")
from study.processes import Process
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
child = Process({SLEEP!r}, {str(tmp_path / "output")!r})
while child.printed() != "up\\n":
    time.sleep(0.02)
print(child._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        assert not is_gone(child)
        process.kill()
    wait_for(lambda: is_gone(child))


def test_a_command_whose_parent_ended_before_it_began_does_not_begin(tmp_path):
    script = "tools/study/die_with_parent.py"
    touch = [sys.executable, "-c", f"open({str(tmp_path / 'began')!r}, 'w')"]
    done = subprocess.run([sys.executable, script, "1", *touch], capture_output=True, text=True)
    assert done.returncode == 1 and "its parent has ended" in done.stderr and not (tmp_path / "began").exists()
    assert subprocess.run([sys.executable, script, str(os.getpid()), *touch]).returncode == 0
    assert (tmp_path / "began").exists()


# the table


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(comparison, file, states):
    table = StatusTable(comparison, file)
    for changed in states:
        table.show(dict(zip(comparison.runs, changed)))
    return file.getvalue()


STATES = [
    [RunState("running"), RunState("queued", "Slurm says Priority")],
    [RunState("running"), RunState("queued", "Slurm says Priority")],
    [RunState("failed", "no memory"), RunState("running")],
]


def metrics(run, text):
    os.makedirs(run.folder)
    Path(run.path("metrics.json")).write_text(text)


def test_on_a_terminal_the_table_is_drawn_in_place(small):
    comparison = small(["GN", "PGN"], [0])
    metrics(comparison.runs[0], '{"iteration": 7, "eta_seconds": 3725.5, "total_loss": 1.0}\n')
    screens = shown(comparison, Terminal(), STATES).split("\x1b[3A")
    assert len(screens) == 3
    lines = [line.replace("\x1b[2K", "").split() for line in screens[0].splitlines()]
    assert lines[1] == "GN seed 0 running 8 of 20 1:02:05".split()
    assert lines[2] == "PGN seed 0 queued 0 of 20 Slurm says Priority".split()
    assert "no memory" in screens[2] and "no memory" not in screens[1]


def test_a_terminal_that_is_too_small_has_what_fits(small, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "4")
    comparison = small(["GN", "PGN"], [0, 1, 2])
    text = shown(comparison, Terminal(), [[RunState("queued", "x" * 99)] * 6])
    lines = [line.replace("\x1b[2K", "").replace("\x1b[0J", "") for line in text.splitlines()]
    assert lines[-2:] == ["and 5 more", ""] and all(len(line) < 30 for line in lines) and len(lines) == 4


def test_elsewhere_a_line_is_written_for_each_change(small):
    comparison = small(["GN", "PGN"], [0])
    metrics(comparison.runs[0], '{"iteration": 7, "eta_seconds": 3725.5, "total_loss": 1.0}\n')
    Path(comparison.runs[0].path("output.txt")).write_text("")
    assert shown(comparison, io.StringIO(), STATES).splitlines() == [
        "GN seed 0: running, at iteration 8 of 20, 1:02:05 left",
        "PGN seed 0: queued, Slurm says Priority",
        f"GN seed 0: failed, no memory ({comparison.runs[0].path('output.txt')})",
        "PGN seed 0: running, at iteration 0 of 20",
    ]
