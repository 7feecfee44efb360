"""Train a comparison's runs as jobs of a Slurm cluster, through submitit.

Each run is a job with one task on each of its machines. The file ``slurm_job`` in the run's folder has the job's id, so
that whoever watches the comparison next asks Slurm about the job before submitting the run again. Slurm says whether a
run has ended, and run.json, which the job writes, says how.
"""

import copy
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gng_d2.errors import InputError
from gng_d2.job.config import read_config
from gng_d2.job.files import atomic_open
from gng_d2.job.imports import import_modules

from . import ROOT
from .comparison import Comparison, Run, RunState
from .locks import lock
from .processes import start_training

# Slurm's states of jobs that have ended. In every other state a job goes on, also where Slurm requeues it.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}

TOOLS = os.path.join(ROOT, "tools")

# how often a run may reach its time limit and be requeued; submitit's default is 3
TIMEOUTS = 1000


class InQueue(NamedTuple):
    """What squeue says of a job."""

    state: str
    reason: str


class Slurm:
    """Trains a comparison's runs as jobs, which go on when this process ends.

    Args:
        parallel: how many jobs run at a time, at most.
        minutes: a job's time limit. A run that reaches it, or is preempted, is requeued and resumes.
        cpus: CPUs of each machine, by default one for each training process and for each process of its data loader.
        parameters: more options of sbatch by name, for instance {"partition": "gpu", "exclusive": True}.

    Raises:
        InputError: submitit or Slurm is not installed.
    """

    pause = 5.0  # seconds between two looks at the runs, because each squeue is work for the cluster's slurmctld

    def __init__(
        self,
        comparison: Comparison,
        parallel: int = 1,
        minutes: int = 1440,
        cpus: int | None = None,
        parameters: Mapping[str, object] | None = None,
    ):
        try:
            import submitit
        except ImportError:
            raise InputError("--cluster slurm needs submitit: pip install submitit") from None
        self.comparison, self.parallel = comparison, parallel
        self.folder = os.path.join(comparison.output, "slurm")  # submitit's files, and what its processes print
        parameters = dict(parameters or {})
        # not comparison.cfg, where the device of a machine without GPUs is cpu
        device = read_config(comparison.config_file, comparison.overrides).MODEL.DEVICE
        if device.startswith("cuda") and not any(name == "gres" or name.startswith("gpus") for name in parameters):
            parameters["gpus-per-node"] = comparison.num_gpus
        cpus = cpus or comparison.num_gpus * (1 + comparison.cfg.DATALOADER.NUM_WORKERS)
        try:
            self._executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=TIMEOUTS)
        except RuntimeError:
            raise InputError("--cluster slurm: there is no srun here. Run it where sbatch and squeue work") from None
        self._settings = {
            "job_name": "compare",
            "time": minutes,
            "nodes": comparison.num_machines,
            "ntasks_per_node": 1,
            "cpus_per_task": cpus,
            "setup": [f"export PYTHONPATH={shlex.quote(TOOLS)}${{PYTHONPATH:+:$PYTHONPATH}}"],  # to find this module
            # Only some versions of srun take --cpus-per-task from sbatch. A machine that fails ends the others, which
            # would wait for it.
            "srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"],
            "additional_parameters": {"requeue": True, **parameters},
        }
        self._jobs: dict[Run, str] = {}
        self._states: dict[Run, RunState] = {}

    def start(self, runs: Sequence[Run]) -> None:
        """Submit the ``runs`` that have no job.

        Raises:
            InputError: Slurm does not answer, or refuses them.
        """
        os.makedirs(self.folder, exist_ok=True)
        # two commands that start at once submit one after the other
        with lock(os.path.join(self.folder, "lock"), wait=True):
            queue = _squeue()
            jobs = {run: _read(run.path("slurm_job")) for run in runs}
            self._jobs = {run: job for run, job in jobs.items() if job in queue and queue[job].state not in ENDED}
            self._states = {run: RunState("queued") for run in runs}
            self._submit([run for run in runs if run not in self._jobs])

    def _submit(self, runs):
        runs = [run for run in runs if self._prepare(run)]
        if not runs:
            return
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        free = max(1, self.parallel - len(self._jobs))
        self._executor.update_parameters(**self._settings, array_parallelism=free)
        try:
            with self._executor.batch():
                jobs = [
                    self._executor.submit(TrainingJob(self.comparison, run, self._settings["time"])) for run in runs
                ]
        except (FailedJobError, FailedSubmissionError) as error:
            lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
            raise InputError(f"sbatch refused the runs: {(lines or [str(error)])[-1]}") from error
        for run, job in zip(runs, jobs):
            with atomic_open(run.path("slurm_job")) as file:
                file.write(job.job_id)
            self._jobs[run] = job.job_id

    def _prepare(self, run):
        """Whether the run's folder can be used. If not, the run's state says why."""
        try:
            os.makedirs(run.folder, exist_ok=True)
            _forget_failure(run)
        except OSError as error:  # for instance if there is a file in place of its folder
            self._states[run] = RunState("failed", str(error))
        return self._states[run].status != "failed"

    def states(self) -> dict[Run, RunState]:
        """The state of every run that was started; the last known one if Slurm does not answer."""
        try:
            queue = _squeue()
        except InputError as error:
            waiting = {run: s for run, s in self._states.items() if s.status in ("queued", "running")}
            return self._states | {run: RunState(state.status, str(error)) for run, state in waiting.items()}
        self._states.update({run: self._state(run, queue.get(job)) for run, job in self._jobs.items()})
        return dict(self._states)

    def _state(self, run, job: InQueue | None):
        if job and job.state in WAITING:
            return RunState("queued", None if job.reason == "None" else f"Slurm says {job.reason}")
        if job and job.state not in ENDED:
            return RunState("running", None if job.state == "RUNNING" else f"Slurm says {job.state}")
        os.listdir(run.folder)  # makes a network file system look again
        state = self.comparison.state(run)
        if state.status != "not finished":
            return state
        if job and job.state == "COMPLETED":
            return RunState("running", "has ended, and its run.json is not here yet")
        said = f"ended as {job.state} ({job.reason})" if job else "is unknown to Slurm and left no run.json"
        state = RunState(
            "failed", f"job {self._jobs[run]} {said}; its log is {self.folder}/{self._jobs[run]}_0_log.err"
        )
        run.record(state)
        return state

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        going_on = [job for run, job in self._jobs.items() if self._states[run].status in ("queued", "running")]
        if going_on and kind is KeyboardInterrupt and _asked(f"\n{len(going_on)} jobs go on. Cancel them? [y/N] "):
            subprocess.run(["scancel", *going_on], check=False)


class TrainingJob:
    """What each task of a run's job does, in at most ``minutes``. submitit calls ``checkpoint`` to requeue it."""

    def __init__(self, comparison: Comparison, run: Run, minutes: int):
        self.comparison, self.run, self.minutes = copy.copy(comparison), run, minutes
        vars(self.comparison).pop("cfg", None)  # it names the device of the machine that submits

    def __call__(self):
        import submitit

        self._began, self._began_from = time.time(), _read(self.run.path("last_checkpoint"))
        job = submitit.JobEnvironment()
        rank, url = job.global_rank, "auto"
        if self.comparison.num_machines > 1:
            port = 10000 + int(job.raw_job_id) % 20000  # lower than the ports that systems give out by themselves
            url = f"tcp://{job.hostnames[0]}:{port}"
        import_modules(self.comparison.imports)
        if rank == 0:  # an earlier start of this job may have left one
            _forget_failure(self.run)
        with start_training(self.comparison, self.run, rank, url) as process:
            code = process.wait()
        if code == -signal.SIGTERM:  # Slurm sent it and will kill or requeue this job, so the run has not failed
            time.sleep(600)
        state = process.end(self.comparison.machine())
        # Where several tasks fail, the first one has the reason, because the others lose the connection to it.
        if (state.reason or rank == 0) and self.run.recorded_state().status == "not finished":
            self.run.record(state)
        if state.reason:
            sys.exit(state.reason)

    def checkpoint(self):
        """What submitit requeues when the job is preempted or reaches its time limit. None, and the run has failed, if
        it had most of the job's time and wrote no checkpoint, because it would do the same each time."""
        from submitit.helpers import DelayedSubmission

        enough = 60 * min(0.8 * self.minutes, self.minutes - 10)  # submitit calls what comes later a time-out
        if time.time() - self._began < enough or _read(self.run.path("last_checkpoint")) != self._began_from:
            return DelayedSubmission(self)
        if self.run.recorded_state().status == "not finished":
            reason = f"no checkpoint in the {self.minutes} minutes of a job. Raise --slurm-time, or lower "
            self.run.record(RunState("failed", reason + "SOLVER.CHECKPOINT_PERIOD"))
        return None


def job_of(run: Run) -> str | None:
    """The id of the job that trains ``run`` or waits to; None if there is no such job."""
    job = _read(run.path("slurm_job"))
    if job is None or shutil.which("squeue") is None:
        return None
    known = _squeue().get(job)
    return job if known and known.state not in ENDED else None


def _squeue() -> dict[str, InQueue]:
    """What Slurm says of this user's jobs, also of those that ended some minutes ago."""
    command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"squeue: {error}") from error
    if done.returncode:
        raise InputError(f"squeue: {done.stderr.strip()}")
    return {job: InQueue(*rest) for job, *rest in (line.strip().split("|", 2) for line in done.stdout.splitlines())}


def _forget_failure(run):
    if run.recorded_state().status != "not finished":
        os.remove(run.path("run.json"))


def _read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _asked(question):
    try:
        return sys.stdin.isatty() and input(question).strip().lower() in ("y", "yes")
    except (KeyboardInterrupt, EOFError):
        return False
