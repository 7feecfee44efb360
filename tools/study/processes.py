"""The process that trains a run. It ends together with the process that started it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from .comparison import Comparison, Run, RunState
from .rows import commit

DIE_WITH_PARENT = os.path.join(os.path.dirname(__file__), "die_with_parent.py")


def start_training(
    comparison: Comparison,
    run: Run,
    machine_rank: int = 0,
    dist_url: str = "auto",
    environment: Mapping[str, str] | None = None,
) -> "Process":
    """Start to train ``run`` from its last checkpoint on, or one machine's share of it.

    What it prints goes into ``output.txt`` of the run's folder, or into ``output.RANK.txt`` on all machines but the
    first.

    Raises:
        OSError, InputError: the run's folder cannot be written.
    """
    os.makedirs(run.folder, exist_ok=True)
    if machine_rank == 0:
        _end_line(run.path("metrics.json"))
    log = run.path(f"output.{machine_rank}.txt" if machine_rank else "output.txt")
    return Process(comparison.command(run, machine_rank, dist_url), log, environment)


class Process:
    """A command whose output is appended to the file ``log``. It must not outlive the thread that started it.

    The end of a ``with`` statement kills it, and the processes that it started, unless it has ended without an error.

    Args:
        environment: the environment variables of the command, by default those of this process.
    """

    def __init__(self, command: Sequence[str], log: str, environment: Mapping[str, str] | None = None):
        self._log, self._commit = log, commit()  # now, because it may be another one when the command ends
        with open(log, "ab") as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-IS", DIE_WITH_PARENT, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self.poll, self.wait = self._process.poll, self._process.wait  # as subprocess.Popen's

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.poll() != 0:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self.wait()

    def failure(self) -> str | None:
        """The message of the error with which the command has ended. None if it did not fail."""
        code = self._process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by {signal.Signals(-code).name}" + " (out of memory?)" * (code == -signal.SIGKILL)
        lines = [line.strip() for line in self.printed().splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
        return (errors or lines or [f"exit status {code}"])[-1].removeprefix("error: ")

    def end(self, machine: str) -> RunState:
        """The state of a run whose command has ended on ``machine``."""
        reason = self.failure()
        return RunState("failed" if reason else "finished", reason, machine, self._commit)

    def printed(self) -> str:
        """What the command has printed so far."""
        with open(self._log, "rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")


def _end_line(path):
    """Remove the half line that a killed run may leave, which would become the start of the next line."""
    with suppress(FileNotFoundError), open(path, "rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
