"""Watch a comparison's runs in one table, wherever they are trained."""

import datetime
import shutil
import sys
import time
from collections.abc import Iterator
from typing import IO

from tabulate import tabulate

from .comparison import Comparison, Run, RunState
from .local import Local
from .metrics import last_record
from .slurm import Slurm


def train_all(cluster: Local | Slurm) -> Iterator[Run]:
    """Train the runs that are not finished on ``cluster``, and yield each one when it ends. A run that fails does not
    stop the others."""
    comparison = cluster.comparison
    states = {run: comparison.state(run) for run in comparison.runs}
    left = [run for run in comparison.runs if states[run].status != "finished"]
    table = StatusTable(comparison)
    cluster.start(left)
    while left:
        states.update(cluster.states())
        table.show(states)
        ended = [run for run in left if states[run].status not in ("queued", "running")]
        for run in ended:
            left.remove(run)
            yield run
        if not ended:
            time.sleep(cluster.pause)


class StatusTable:
    """Shows how the runs of a comparison stand: on a terminal as a table that is drawn in place, in a file as a line
    for each change."""

    def __init__(self, comparison: Comparison, file: IO | None = None):
        self._comparison, self._file = comparison, file or sys.stdout
        self._total = comparison.cfg.SOLVER.MAX_ITER
        self._drawn, self._said = 0, {}

    def show(self, states: dict[Run, RunState]) -> None:
        rows = [self._row(run, state) for run, state in states.items()]
        if self._file.isatty():
            rows = [(run, status, f"{done} of {self._total}", left, why) for run, status, done, left, why in rows]
            self._draw(tabulate(rows, ["run", "", "iteration", "left", ""], tablefmt="plain").splitlines())
        else:
            for row in rows:
                self._say(*row)
        self._file.flush()

    def _row(self, run, state):
        """The cells of a run: its name, status, iterations done, time left, and the reason of its status."""
        done = self._total if state.status == "finished" else self._comparison.iterations_done(run)
        seconds = last_record(run.path("metrics.json")).get("eta_seconds") if state.status == "running" else None
        left = "" if seconds is None else str(datetime.timedelta(seconds=int(seconds)))
        return str(run), state.status, done, left, (state.reason or "") + run.log_hint(state)

    def _draw(self, lines):
        width, height = shutil.get_terminal_size()
        if len(lines) >= height:  # lines that have scrolled away cannot be drawn again
            lines = [*lines[: height - 2], f"and {len(lines) - height + 2} more"]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        self._file.write(up + "".join(f"\x1b[2K{line[: width - 1]}\n" for line in lines) + "\x1b[0J")
        self._drawn = len(lines)

    def _say(self, run, status, done, left, reason):
        change = status, reason, 10 * done // self._total  # so there is a line at each tenth of the iterations too
        if self._said.get(run) != change:
            self._said[run] = change
            words = [f"{run}: {status}", f"at iteration {done} of {self._total}" * (status == "running")]
            words += [f"{left} left" * bool(left), reason]
            print(", ".join(filter(None, words)), file=self._file)
