"""Files that appear whole or not at all, a check that they can be written, and a run's metrics.json."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from gng_d2.errors import InputError

__all__ = [
    "atomic_open",
    "write_json",
    "save_figure",
    "prepare_folder",
    "prepare_outputs",
    "read_metrics",
    "last_record",
    "last_iteration",
]


@contextmanager
def atomic_open(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a file to write that takes the name ``path`` once it is whole.

    Until then, and where the body fails or the disk is full, what was there before stays as it was, and nothing
    else is left behind.

    Args:
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        InputError: ``path`` cannot be written; says why.

    Examples::
        >>> with atomic_open("rows.json") as file:
        ...     _ = file.write("[]")
    """
    path = os.path.realpath(path)  # a link stays one
    encoding = None if "b" in mode else "utf-8"
    if _is_device(path):
        with _naming(path), open(path, mode, encoding=encoding) as file:
            yield file
        return
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with _naming(path, partial), open(partial, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.path.exists(path):
                shutil.copymode(path, partial)
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            os.remove(partial)


def _is_device(path):
    """Whether ``path`` is a device or a pipe, /dev/stdout say, which must not be replaced by a file."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextmanager
def _naming(path, *more):
    """Turns what goes wrong with a file, a full disk say, into an error that names it."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, path, *more):
            raise  # another file's, which the body reads
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: str, content) -> None:
    """Write ``content`` as JSON a person can read, whole or not at all. NumPy's numbers become Python's."""
    with atomic_open(path) as file:
        json.dump(content, file, indent=1, default=float)


def save_figure(figure, path: str, dpi: int) -> None:
    """Write a :class:`matplotlib.figure.Figure` whole or not at all. The ending of ``path`` says in which format."""
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format=os.path.splitext(path)[1][1:].lower(), dpi=dpi)


def prepare_folder(folder: str) -> None:
    """Make ``folder`` if it is not there, and see that files can be written in it.

    Raises:
        OSError: they cannot; says why.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # on a full disk an empty one can be made
        file.write(bytes(2**16))


def prepare_outputs(*paths: str | None) -> None:
    """Make the folders of ``paths`` (None is skipped) before a long work, and see that the files can be written.

    Raises:
        InputError: names the file and what stands in its way.
    """
    for path in filter(None, paths):
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(None, "it is a folder")
            if not _is_device(path):
                prepare_folder(os.path.dirname(path) or ".")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


def read_metrics(path: str) -> list[dict]:
    """The records in the metrics.json that Detectron2 writes of a run, by iteration.

    What a run wrote after the checkpoint from which it was resumed, and what an earlier run wrote to the same file,
    is left out. So are lines that are no records, as a run that is killed may leave them.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    records, latest = {}, -1
    with open(path, "rb") as file:
        for record in _records(file):
            iteration = record["iteration"]
            if "total_loss" in record:  # an evaluation may be written after later losses
                if iteration <= latest:
                    records = {i: r for i, r in records.items() if i < iteration}
                latest = iteration
            records[iteration] = record
    return [records[iteration] for iteration in sorted(records)]


def last_record(path: str) -> dict:
    """The last record in a run's metrics.json, {} if there is none. Reads its end alone."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2**16))
            return [{}, *_records(file)][-1]
    except OSError:
        return {}


def last_iteration(path: str) -> int:
    """The iteration of :func:`last_record`, -1 if there is none."""
    return last_record(path).get("iteration", -1)


def _records(lines: Iterable[bytes]) -> Iterator[dict]:
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and all(type(value) in (int, float) for value in record.values()):
                if type(record.get("iteration")) is int and record["iteration"] < 2**63:
                    yield record
