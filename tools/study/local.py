"""Train a comparison's runs on this machine, several side by side."""

import os
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from gng_d2.errors import InputError

from .comparison import Comparison, Run, RunState
from .locks import lock
from .processes import start_training
from .slurm import job_of


class Local:
    """Trains up to ``parallel`` runs at a time, each in a process that ends with this one.

    Several on one machine may train the same comparison: each takes the runs that the others leave.

    Args:
        machine_rank: which of ``comparison.num_machines`` this one is. The same command runs on each of them.
        dist_url: the address of the first machine, tcp://NAME:PORT.

    Raises:
        InputError: this machine has too few GPUs for ``parallel`` runs, or ``dist_url`` is missing.
    """

    pause = 1.0  # seconds between two looks at the runs

    def __init__(self, comparison: Comparison, parallel: int = 1, machine_rank: int = 0, dist_url: str = "auto"):
        if comparison.num_machines > 1 and dist_url == "auto":
            raise InputError("--num-machines: give --dist-url tcp://FIRST-MACHINE:PORT, the same on all machines")
        if comparison.num_machines > 1 and parallel > 1:
            raise InputError("--parallel: several machines train one run at a time, unless --cluster is slurm")
        if not 0 <= machine_rank < comparison.num_machines:
            raise InputError(f"--machine-rank {machine_rank}: 0 to {comparison.num_machines - 1}, see --num-machines")
        self.comparison = comparison
        self.machine_rank, self.dist_url = machine_rank, dist_url
        self._waiting, self._free = deque(), shares(comparison, parallel)
        self._running, self._states = {}, {}

    def start(self, runs: Sequence[Run]) -> None:
        """Train ``runs``, in this order."""
        self._waiting.extend(runs)
        self._states.update({run: RunState("queued") for run in runs})

    def states(self) -> dict[Run, RunState]:
        """The state of every run that was started. Where a run has ended, this call begins the next one."""
        for run, (process, _, _) in list(self._running.items()):
            if process.poll() is not None:
                self._end(run)
        while self._waiting and self._free:
            self._begin(self._waiting.popleft())
        return dict(self._states)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for _, _, held in self._running.values():
            held.close()

    def _begin(self, run):
        with ExitStack() as stack:
            try:
                os.makedirs(run.folder, exist_ok=True)
                stack.enter_context(lock(run.path(f"lock.{self.machine_rank}"), wait=False))
                job = job_of(run)
                if job:
                    self._states[run] = RunState("left", f"Slurm's job {job} trains it")
                elif self.comparison.state(run).status != "finished":
                    share = self._free[0]
                    process = stack.enter_context(
                        start_training(self.comparison, run, self.machine_rank, self.dist_url, {**os.environ, **share})
                    )
                    self._running[run] = process, self._free.pop(0), stack.pop_all()
                    self._states[run] = RunState("running")
                else:  # another process has trained it since this one looked
                    self._states[run] = self.comparison.state(run)
            except BlockingIOError:
                self._states[run] = RunState("left", "another process trains it")
            except (OSError, InputError) as error:  # for instance if there is a file in place of its folder
                self._states[run] = RunState("failed", str(error))

    def _end(self, run):
        process, share, held = self._running.pop(run)
        self._free.append(share)
        with held:
            threads = share.get("OMP_NUM_THREADS")
            state = process.end(self.comparison.machine(threads and int(threads)))
            try:
                if self.machine_rank == 0:
                    run.record(state)
                    state = self.comparison.state(run)
            except (OSError, InputError) as error:
                state = RunState("failed", str(error))
            self._states[run] = state


def shares(comparison: Comparison, parallel: int) -> list[dict[str, str]]:
    """The environment variables for each of ``parallel`` runs, which divide the GPUs or CPU threads of this process
    among them. A single run has them all.

    Raises:
        InputError: there are too few GPUs.
    """
    if parallel == 1:
        return [{}]
    processes = comparison.num_gpus
    if not comparison.cfg.MODEL.DEVICE.startswith("cuda"):
        threads = max(1, torch.get_num_threads() // (parallel * processes))
        return [{"OMP_NUM_THREADS": str(threads)}] * parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if parallel * processes > len(gpus):
        raise InputError(
            f"--parallel {parallel} with --num-gpus {processes} needs {parallel * processes} GPUs, and there are "
            f"{len(gpus)}: {','.join(gpus)}"
        )
    groups = [gpus[first : first + processes] for first in range(0, parallel * processes, processes)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]
