"""Runs as jobs of a fake Slurm, whose commands print what a test wants. tests/slurm has the tests with a real one."""

import importlib
import importlib.util
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import pytest

from gng_d2.errors import InputError
from study.comparison import Comparison, RunState
from study.local import Local
from study.slurm import Slurm, TrainingJob
from study.watch import train_all

needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")

# squeue prints the file `queue`; sbatch keeps the script that it is given and adds its jobs to the file
SBATCH = """#!/bin/sh
cat "$1" > "$FAKE/script"
echo $(( $(cat "$FAKE/last" 2>/dev/null || echo 10) + 1 )) > "$FAKE/last"
id=$(cat "$FAKE/last")
range=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
if [ -n "$range" ]; then for i in $(seq 0 $range); do echo "${id}_$i|PENDING|Priority" >> "$FAKE/queue"; done
else echo "$id|PENDING|None" >> "$FAKE/queue"; fi
echo "Submitted batch job $id"
"""
FAKES = {
    "sbatch": SBATCH,
    "squeue": '#!/bin/sh\n[ -f "$FAKE/down" ] && { echo "Unable to contact slurm controller" >&2; exit 1; }\n'
    'cat "$FAKE/queue" 2>/dev/null || true\n',
    "scancel": '#!/bin/sh\necho "$@" >> "$FAKE/cancelled"\n',
    "srun": "#!/bin/sh\n",
}


class Fake:
    """The fake Slurm's folder."""

    def __init__(self, folder):
        self.folder = folder

    def queue(self, **states):
        """Set what squeue prints from now on: job_11_0="RUNNING|None" is a line for the job 11_0."""
        lines = [f"{job.removeprefix('job_')}|{state}\n" for job, state in states.items()]
        (self.folder / "queue").write_text("".join(lines))

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Fake(folder)


def started(comparison, **options):
    cluster = Slurm(comparison, **options)
    cluster.start([run for run in comparison.runs if comparison.state(run).status != "finished"])
    return cluster


def said(cluster):
    return [cluster.states()[run] for run in cluster.comparison.runs if run in cluster.states()]


def test_what_is_missing_is_named(small, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match="needs submitit: pip install submitit"):
        Slurm(small())


@needs_submitit
def test_without_slurm_it_is_refused(small, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no srun here"):
        Slurm(small())


@needs_submitit
def test_what_is_asked_of_slurm(fake, small):
    options = {"partition": "gpu", "exclusive": True}
    started(small(num_gpus=8, num_machines=2), parallel=3, minutes=90, parameters=options)
    script = fake.read("script")
    loaders = small().cfg.DATALOADER.NUM_WORKERS
    for option in (
        *(
            "--array=0-3%3",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--gpus-per-node=8",
            f"--cpus-per-task={8 + 8 * loaders}",
        ),
        *("--time=90", "--partition=gpu", "--exclusive", "--requeue", "--signal=USR2@90"),
    ):
        assert re.search(rf"^#SBATCH {re.escape(option)}$", script, re.MULTILINE), (option, script)
    assert f"export PYTHONPATH={os.path.abspath('tools')}" in script and "--kill-on-bad-exit=1" in script


@needs_submitit
@pytest.mark.parametrize(
    "overrides, parameters", [(["MODEL.DEVICE", "cpu"], {}), ([], {"gres": "gpu:a100:1"}), ([], {"gpus-per-task": 1})]
)
def test_no_gpus_are_asked_for_where_none_or_others_are_wanted(overrides, parameters, fake, small):
    started(small(overrides=["SOLVER.MAX_ITER", "20", *overrides]), parameters=parameters)
    assert "--gpus-per-node" not in fake.read("script")


@needs_submitit
def test_what_slurm_refuses_is_said(fake, small):
    (fake.folder / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2; exit 1\n")
    with pytest.raises(InputError, match="sbatch refused the runs: sbatch: error: invalid partition specified: x"):
        started(small())


@needs_submitit
def test_a_file_in_place_of_a_folder_takes_no_other_run_down(fake, small):
    comparison = small(["GN", "PGN"], [0])
    Path(comparison.output, "GN").mkdir(parents=True)
    Path(comparison.runs[0].folder).write_text("")
    broken, other = said(started(comparison))
    assert broken.status == "failed" and comparison.runs[0].folder in broken.reason
    assert other.status == "queued"


@needs_submitit
def test_a_run_that_has_a_job_is_not_submitted_again(fake, small):
    started(small(["GN"], [0, 1]), parallel=4)
    assert [run.path("slurm_job") for run in small(["GN"], [0, 1]).runs if Path(run.path("slurm_job")).exists()]
    started(small(["GN"], [0, 1]))
    assert fake.read("last") == "11\n"
    started(small(["GN", "PGN"], [0, 1]), parallel=4)  # two more: up to four at a time with the others
    assert "--array=0-1%2" in fake.read("script") and fake.read("last") == "12\n"
    fake.queue(job_11_0="RUNNING|None", job_12_0="PENDING|Priority", job_12_1="NODE_FAIL|NodeDown")  # forgotten: 11_1
    cluster = started(small(["GN", "PGN"], [0, 1]), parallel=4)
    assert [cluster._jobs[run] for run in cluster.comparison.runs] == ["11_0", "12_0", "13_0", "13_1"]


@needs_submitit
@pytest.mark.parametrize(
    "queue, expected",
    [
        ("PENDING|Priority", RunState("queued", "Slurm says Priority")),
        ("PENDING|PartitionTimeLimit", RunState("queued", "Slurm says PartitionTimeLimit")),
        ("PENDING|None", RunState("queued")),
        ("REQUEUE_HOLD|launch failed requeued held", RunState("queued", "Slurm says launch failed requeued held")),
        ("RUNNING|None", RunState("running")),
        ("COMPLETING|None", RunState("running", "Slurm says COMPLETING")),
        ("COMPLETED|None", RunState("running", "has ended, and its run.json is not here yet")),
    ],
)
def test_what_slurm_says_of_a_run_that_goes_on(queue, expected, fake, small):
    cluster = started(small(["GN"], [0]))
    fake.queue(job_11=queue)
    assert said(cluster) == [expected]
    assert cluster.comparison.state(cluster.comparison.runs[0]).status == "not finished"


@needs_submitit
@pytest.mark.parametrize(
    "queue, reason",
    [
        ({"job_11": "NODE_FAIL|NodeDown"}, "job 11 ended as NODE_FAIL (NodeDown)"),
        ({"job_11": "OUT_OF_MEMORY|OutOfMemory"}, "job 11 ended as OUT_OF_MEMORY (OutOfMemory)"),
        ({"job_11": "CANCELLED|None"}, "job 11 ended as CANCELLED (None)"),
        ({"job_11": "FAILED|NonZeroExitCode"}, "job 11 ended as FAILED (NonZeroExitCode)"),
        ({}, "job 11 is unknown to Slurm and left no run.json"),
    ],
)
def test_a_job_that_ended_without_a_result_has_failed_and_says_how(queue, reason, fake, small):
    cluster = started(small(["GN"], [0]))
    fake.queue(**queue)
    (run,) = cluster.comparison.runs
    (state,) = said(cluster)
    assert state == cluster.comparison.state(run) and state.status == "failed"
    assert state.reason == f"{reason}; its log is {cluster.folder}/11_0_log.err"


@needs_submitit
def test_a_runs_own_reason_stands_and_only_once_its_job_has_ended(fake, small):
    cluster = started(small(["GN"], [0]))
    (run,) = cluster.comparison.runs
    run.record(RunState("failed", "the loss is not finite"))
    fake.queue(job_11="PENDING|BeginTime")  # requeued
    assert said(cluster)[0].status == "queued"
    fake.queue(job_11="FAILED|NonZeroExitCode")
    assert said(cluster) == [RunState("failed", "the loss is not finite")]
    cluster = started(small(["GN"], [0]))  # once more: the old reason is none of the new job's
    fake.queue(job_12="CANCELLED|None")
    assert "job 12 ended as CANCELLED" in said(cluster)[0].reason


@needs_submitit
def test_where_slurm_does_not_answer_the_runs_stay_what_they_were(fake, small):
    cluster = started(small(["GN"], [0]))
    (fake.folder / "down").touch()
    assert said(cluster) == [RunState("queued", "squeue: Unable to contact slurm controller")]
    (fake.folder / "down").unlink()
    assert said(cluster) == [RunState("queued")]
    (fake.folder / "down").touch()
    with pytest.raises(InputError, match="Unable to contact slurm controller"):
        started(small())


@needs_submitit
@pytest.mark.parametrize("answer, cancelled", [("y", "11_0 11_1\n"), ("n", ""), ("", ""), (None, "")])
def test_ctrl_c_asks_before_it_cancels(answer, cancelled, fake, small, monkeypatch):
    """No job is cancelled, because there is no terminal on which to ask."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: answer is not None, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    with pytest.raises(KeyboardInterrupt), started(small(["GN"], [0, 1])):
        raise KeyboardInterrupt
    assert fake.read("cancelled") == cancelled


@needs_submitit
def test_a_run_that_a_job_trains_is_not_trained_here(job, fake, small):
    comparison = small(["GN"], [0])
    started(comparison)
    cluster = Local(comparison)
    list(train_all(cluster))
    assert list(cluster.states().values()) == [RunState("left", "Slurm's job 11 trains it")]
    fake.queue()
    list(train_all(Local(comparison)))
    assert comparison.state(comparison.runs[0]).status == "finished"


# what a job does, in its task

IN_A_JOB = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_ID": "31",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
}


@pytest.fixture
def enter(monkeypatch):
    """Make this process a task of a run's job."""

    def enter(run, rank):
        for name, value in {**IN_A_JOB, "SLURM_PROCID": str(rank)}.items():
            monkeypatch.setenv(name, value)
        os.makedirs(run.folder, exist_ok=True)

    return enter


@pytest.fixture
def task(enter):
    """Do what a task of a run's job does, and return how it exited."""

    def work(comparison, run, rank):
        enter(run, rank)
        try:
            pickle.loads(pickle.dumps(TrainingJob(comparison, run, 60)))()
        except SystemExit as ended:
            return ended.code

    return work


@needs_submitit
def test_rank_and_address_are_those_of_slurm(job, fake, small, task):
    comparison = small(["GN"], [0], num_machines=2)
    (run,) = comparison.runs
    assert task(comparison, run, 1) is None
    assert comparison.state(run).status == "not finished"  # the first machine's to say
    assert task(comparison, run, 0) is None
    assert comparison.state(run).status == "finished"
    second, first = Path(run.path("arguments")).read_text().splitlines()
    assert "--machine-rank 1 --dist-url tcp://node07:10031" in second
    assert "--machine-rank 0 --dist-url tcp://node07:10031" in first


@needs_submitit
def test_the_first_machine_that_fails_says_why(job, fake, small, task):
    comparison = small(["GN3"], [0], num_machines=2)
    (run,) = comparison.runs
    assert task(comparison, run, 1) == "ValueError: it does not divide"
    assert comparison.state(run).reason == "ValueError: it does not divide"
    run.record(RunState("failed", "before it was started again"))
    assert task(comparison, run, 0) == "ValueError: it does not divide"
    assert comparison.state(run).reason == "ValueError: it does not divide"


# as Slurm does to all processes of a job
TERMINATED = "import os, signal\nos.kill(os.getpid(), signal.{})\nopen('went on', 'w')"


@needs_submitit
def test_a_training_that_slurm_terminates_waits_for_what_comes(fake, small, task, tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(TERMINATED.format("SIGTERM"))
    monkeypatch.setattr("study.comparison.TRAIN_NET", str(tmp_path / "job.py"))
    comparison = small(["GN"], [0])
    (run,) = comparison.runs
    waited = []

    def sleep(seconds):
        waited.append(comparison.state(run).status)
        sys.exit("requeued")

    monkeypatch.setattr("study.slurm.time.sleep", sleep)
    assert task(comparison, run, 0) == "requeued" and waited == ["not finished"]


@needs_submitit
def test_submitits_signal_ends_no_training(fake, small, task, tmp_path, monkeypatch):
    """Slurm sends the signal to all processes of a job, but only the task should react to it."""
    (tmp_path / "job.py").write_text(
        TERMINATED.format(signal.SIGUSR2.name).replace("'went on'", repr(str(tmp_path / "on")))
    )
    monkeypatch.setattr("study.comparison.TRAIN_NET", str(tmp_path / "job.py"))
    comparison = small(["GN"], [0])
    task(comparison, comparison.runs[0], 0)
    assert (tmp_path / "on").exists()


@needs_submitit
@pytest.mark.parametrize("minutes, checkpoint, requeued", [(9, False, True), (59, True, True), (59, False, False)])
def test_submitit_requeues_a_job_that_gets_on(minutes, checkpoint, requeued, fake, small, enter, monkeypatch):
    import submitit

    comparison = small(["GN"], [0])
    (run,) = comparison.runs
    job, seconds = TrainingJob(comparison, run, 60), [0.0]
    monkeypatch.setattr("study.slurm.time.time", lambda: seconds[0])

    class Training:  # until Slurm's signal
        def __enter__(self):
            seconds[0] += 60 * minutes
            if checkpoint:
                Path(run.path("last_checkpoint")).write_text("model_0000099.pth")
            delayed = submitit.helpers.DelayedSubmission(job)._checkpoint_function()
            assert (delayed is not None) == requeued and (delayed is None or delayed.function is job)
            raise InterruptedError

        def __exit__(self, *error):
            return None

    monkeypatch.setattr("study.slurm.start_training", lambda *args: Training())
    enter(run, 0)
    with pytest.raises(InterruptedError):
        job()
    state = comparison.state(run)
    assert state.status == ("not finished" if requeued else "failed")
    assert requeued or "60 minutes of a job. Raise --slurm-time" in state.reason


@needs_submitit
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_gpus_are_asked_for_where_the_config_wants_them(device, fake, small, tmp_path):
    """The machine that submits has none."""
    config = tmp_path / "device.yaml"
    config.write_text(f"_BASE_: {os.path.abspath('configs/quick/pfpn_gn.yaml')}\nMODEL: {{DEVICE: '{device}'}}\n")
    comparison = Comparison(str(config), ["GN"], [0], str(tmp_path / "out"), ["MODEL.SEM_SEG_HEAD.NORM"])
    started(comparison)
    assert ("gpus-per-node" in fake.read("script")) == (device != "cpu")


# the command line


def cluster_of(monkeypatch, comparison, *words):
    compare = importlib.import_module("compare")
    given = ["--config-file", "C", "--norms", "GN", "--seeds", "0", "--output", "O", *words]
    monkeypatch.setattr("sys.argv", ["compare.py", *given])
    return compare.cluster_of(compare.parse_args(), comparison)


@needs_submitit
def test_the_flags_reach_slurm(fake, small, monkeypatch):
    flags = "--cluster slurm --slurm-partition p --slurm-account a --slurm-time 7 --slurm-cpus 3 --parallel 2"
    flags += " --slurm-option mem=0 --slurm-option exclusive"
    comparison = small()
    cluster_of(monkeypatch, comparison, *flags.split()).start(comparison.runs)
    expected = "partition=p account=a time=7 cpus-per-task=3 array=0-3%2 mem=0 exclusive".split()
    assert {f"#SBATCH --{option}" for option in expected} <= {*fake.read("script").splitlines()}


@needs_submitit
@pytest.mark.parametrize(
    "words, message",
    [
        (["--slurm-time", "5"], "--slurm-time is for --cluster slurm"),
        (["--cluster", "slurm", "--machine-rank", "1"], "--machine-rank, --dist-url: Slurm gives"),
    ],
)
def test_flags_of_the_other_cluster_are_refused(words, message, fake, small, monkeypatch):
    with pytest.raises(InputError, match=message):
        cluster_of(monkeypatch, small(), *words)
