"""Measured rows as JSON: each says where it was measured, and no measurement is lost to a bad path."""

import json
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager, suppress
from typing import IO, Dict, Iterator, List, Optional, TextIO

import torch

from .errors import InputError

__all__ = [
    "atomic_open",
    "prepare_folder",
    "machine",
    "check_outputs",
    "read_rows",
    "write_rows",
    "written_whole",
    "read_metrics",
]


def machine(device: str = "cpu") -> str:
    """What a measurement ran on, for instance "2 threads of an AMD EPYC (AVX512), PyTorch 2.14.1"."""
    pytorch = f"PyTorch {torch.__version__.partition('+')[0]}"
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {pytorch}"
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{threads} thread{'s' * (threads > 1)} of {_processor()} ({capability}), {pytorch}"


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def check_outputs(*paths: Optional[str]) -> None:
    """Before a long measurement: each file of ``paths`` (None is skipped) can be written.

    Raises:
        InputError: names the file and what stands in its way.
    """
    for path in filter(None, paths):
        folder = os.path.dirname(path) or "."
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(None, "it is a folder")
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


def read_rows(path: str) -> List[Dict]:
    with open(path) as file:
        return json.load(file)


def write_rows(path: str, rows: List[Dict]) -> None:
    """Write ``rows`` as a JSON list, one row a line, whole or not at all."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    with written_whole(path) as file:
        file.write(f"[\n{lines}\n]\n")


@contextmanager
def written_whole(path: str) -> Iterator[TextIO]:
    """A text file to write that appears under its name when it is whole."""
    partial = f"{path}.{os.getpid()}"
    with open(partial, "w") as file:
        yield file
    os.replace(partial, path)


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
        ...     file.write("[]")
    """
    path = os.path.realpath(path)  # a link stays one
    encoding = None if "b" in mode else "utf-8"
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout, say, which must not be replaced
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


@contextmanager
def _naming(path, *more):
    """Turns what goes wrong with a file, a full disk say, into an error that names it."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, path, *more):
            raise  # another file's, which the body reads
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def prepare_folder(folder: str) -> None:
    """Make ``folder`` if it is not there, and see that files can be written in it.

    Raises:
        OSError: they cannot; says why.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def read_metrics(path: str) -> List[Dict]:
    """The records in a run's metrics.json, as Detectron2 writes it, by iteration. What a run wrote after the
    checkpoint from which it was resumed, and what an earlier run wrote to the same file, is left out."""
    records, latest = {}, -1
    with open(path) as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote
                continue
            iteration = record["iteration"]
            if "total_loss" in record:  # an evaluation may be written after later losses
                if iteration <= latest:
                    records = {i: r for i, r in records.items() if i < iteration}
                latest = iteration
            records[iteration] = record
    return [records[iteration] for iteration in sorted(records)]
