"""The tests of the kernels, one row each: on a GPU where there is one, else in Triton's interpreter.

These are the tests marked gpu, and need pytest. The rows are written as the tests end, so a run that is cut off leaves
those that ran. Ends with exit status 1 if a test fails.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import add_outputs
from gng_d2.job.files import prepare_outputs

from . import ROOT
from .rows import machine, markdown, write_rows


@dataclass(frozen=True)
class KernelTestRow:
    """What became of a test."""

    test: str
    outcome: str  # passed, failed or skipped
    reason: str  # of one that did not pass; else ""
    seconds: float
    machine: str


class _Recorder:
    """A plugin of pytest that writes a row for each test that ends."""

    def __init__(self, path, device):
        self.path, self.machine, self.rows = path, machine(device), []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":  # of setup and teardown alone what went wrong
            self._add(report.nodeid, report)

    def pytest_collectreport(self, report):
        if report.outcome != "passed":
            self._add(report.nodeid, report)

    def _add(self, test, report):
        crash = getattr(report.longrepr, "reprcrash", None)
        if isinstance(report.longrepr, tuple):  # of one that was skipped: file, line, reason
            reason = report.longrepr[2].removeprefix("Skipped: ")
        else:
            reason = crash.message.splitlines()[0] if crash else str(report.longrepr or "")
        row = KernelTestRow(test, report.outcome, reason, getattr(report, "duration", 0.0), self.machine)
        self.rows.append(row)
        if self.path:
            write_rows(self.path, self.rows)


def table(rows: list[KernelTestRow]) -> str:
    """How many passed, and a line for each of the others."""
    counts = Counter(row.outcome for row in rows)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none ran"
    others = [[row.test, row.outcome, row.reason.replace("|", "\\|")] for row in rows if row.outcome != "passed"]
    text = f"Of the kernels' tests {said}."
    return f"{text}\n\n{markdown(others, ['test', 'outcome', 'reason'])}" if others else text


def add_arguments(parser) -> None:
    import torch

    add_outputs(parser, json="write a row for each test")
    parser.add_argument("--quick", action="store_true", help="leave out those that are marked slow")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])


def _start_again_for(device):
    """In this program's place, if Triton, which is imported by now, is not set for ``device``."""
    wanted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {"TRITON_INTERPRET": None}
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    others = {name: value for name, value in os.environ.items() if name not in wanted}
    environment = {**others, **{name: value for name, value in wanted.items() if value is not None}}
    os.execve(sys.executable, sys.orig_argv, environment)


def _files():
    """Those with tests marked gpu alone: others need Detectron2, or that gng_d2 was installed with a C compiler."""
    paths = sorted(Path(ROOT, "tests", "ops").glob("test_*.py"))
    return [str(path) for path in paths if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def main(args) -> None:
    prepare_outputs(args.json)
    _start_again_for(args.device)
    recorder = _Recorder(args.json, args.device)
    marks = "gpu and not slow" if args.quick else "gpu"
    words = ["-q", "-m", marks, "--rootdir", ROOT, "-p", "no:cacheprovider", *_files()]
    status = pytest.main(["--continue-on-collection-errors", *words], plugins=[recorder])
    print(table(recorder.rows))
    sys.exit(min(int(status), 1))
