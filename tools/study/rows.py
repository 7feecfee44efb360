"""What the experiments have in common: rows and their files, runs that can be stopped, statistics, tables.

A row is a frozen dataclass of its experiment. A JSON file holds a list with one row on a line, an object whose keys are
the fields.
"""

import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from tabulate import tabulate

from gng_d2.errors import InputError
from gng_d2.job.files import atomic_open, prepare_outputs

from . import ROOT

Row = TypeVar("Row")


def norm_in_path(name: str) -> str:
    """``name`` for use in file names: ``GN/16`` becomes "GN_16", because a ``/`` would begin a folder; no name becomes
    "none"."""
    return name.replace("/", "_") or "none"


def norm_in_text(name: str) -> str:
    """``name`` for use in tables and messages: no name becomes "no norm"."""
    return name or "no norm"


def machine(device: str = "cpu", threads: int | None = None) -> str:
    """The hardware and the PyTorch of a measurement, such as "2 threads of AMD EPYC (AVX512), PyTorch 2.14.1".

    Args:
        threads: by default those of this process.
    """
    pytorch = f"PyTorch {torch.__version__.partition('+')[0]}"
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {pytorch}"
    threads = threads or torch.get_num_threads()
    capability = re.search(r"CPU capability usage: (\w+)", torch.__config__.show())[1]
    return f"{threads} thread{'s' * (threads > 1)} of {_processor()} ({capability}), {pytorch}"


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" if its files differ from it; None if this is no checkout."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def read_rows(path: str, row_type: type[Row]) -> list[Row]:
    """The rows in a file of :func:`write_rows`.

    Raises:
        InputError: the file is damaged, or its rows are of another experiment.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            return [row_type(**row) for row in json.load(file)]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} holds no rows of {row_type.__module__}: {error}") from error


def rows_to_keep(args, row_type: type[Row], same: Sequence[str] = ()) -> list[Row]:
    """The rows in the file of ``--json`` where ``--resume`` says to keep them; else none.

    Args:
        same: the fields in which each row must have the value that ``args`` has. By default it is the machine that must
            be the same, because times and bytes of two machines do not belong into one table.

    Raises:
        InputError: a row has another value.
    """
    rows = read_rows(args.json, row_type) if args.resume and args.json and os.path.exists(args.json) else []
    wanted = {name: getattr(args, name) for name in same} or {"machine": machine(args.device)}
    for name, here in wanted.items():
        others = {str(getattr(row, name)) for row in rows} - {str(here)}
        if others:
            word = name.replace("_", " ")
            raise InputError(
                f"--resume: {args.json} holds rows with {word} {', '.join(sorted(others))}; here the {word} is {here}. "
                f"Name another --json"
            )
    return rows


def write_rows(path: str | None, rows: Iterable[Row]) -> None:
    """Write ``rows`` as a JSON list with one row on a line, whole or not at all. Nothing is written to None."""
    if path is None:
        return
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)
    with atomic_open(path) as file:
        file.write(f"[\n{lines}\n]\n")


def add_norms(parser, *default: str) -> None:
    """Give ``parser`` the flag ``--norms``."""
    text = f"norms by their names, as a NORM key and convert_norms take them; default: {' '.join(default)}"
    parser.add_argument("--norms", nargs="+", default=list(default), metavar="NORM", help=text)


def add_seeds(parser) -> None:
    """Give ``parser`` the flag ``--seeds``."""
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="seeds of the runs; default: 0 1 2"
    )


_SETTINGS, _ROW = "settings.json", "row.json"


def open_run(folder: str, settings, row_type: type[Row]) -> Row | None:
    """The row of the run in ``folder`` if the run is finished; None if it is new or was stopped.

    So a command that trains many runs and was stopped can skip the runs that it has finished.

    Args:
        settings: a dataclass of the run's settings, which is kept in its folder.

    Raises:
        InputError: the folder cannot be written, is damaged, or holds a run with other settings.
    """
    path = os.path.join(folder, _SETTINGS)
    prepare_outputs(path)
    if not os.path.exists(path):
        write_rows(path, [settings])
    (before,) = read_rows(path, type(settings))
    differ = differences(dataclasses.asdict(before), dataclasses.asdict(settings))
    if differ:
        listed = ", ".join(f"{key} {there} (now {here})" for key, (there, here) in differ.items())
        raise InputError(f"{folder} holds a run with {listed}. Choose another --output, or delete that folder")
    row = os.path.join(folder, _ROW)
    return read_rows(row, row_type)[0] if os.path.exists(row) else None


def finish_run(folder: str, row) -> None:
    """Write the row of a run that :func:`open_run` opened, which makes it a finished one."""
    write_rows(os.path.join(folder, _ROW), [row])


def differences(there: dict, here: dict) -> dict[str, tuple]:
    """Where two nested dicts, such as configs, differ: both values, by dotted key."""
    there, here = dict(leaves(there)), dict(leaves(here))
    return {key: (there.get(key), here.get(key)) for key in {**there, **here} if there.get(key) != here.get(key)}


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each value in a nested dict, such as a config."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean over seeds and the sample standard deviation. Each is None if there are too few values for it, and both
    are if one of the values is None."""
    if not values or None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def markdown(lines: Sequence[Sequence], headers: Sequence[str], digits: str = ".3f") -> str:
    """A table in Markdown. Floats are written with ``digits``, None as a dash, and numbers are right-aligned."""
    columns = list(zip(*lines))
    numbers = [all(value is None or isinstance(value, (int, float)) for value in column) for column in columns]
    cells = [
        ["-" if value is None else f"{value:{digits}}" if isinstance(value, float) else str(value) for value in line]
        for line in lines
    ]
    alignment = ["right" if number else "left" for number in numbers]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True, colalign=alignment or None)
