"""Write files that appear whole or not at all, and check before a long work that they can be written."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from gng_d2.errors import InputError


@contextmanager
def atomic_open(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that takes the name ``path`` when it is whole.

    If the body fails or the disk is full, the file that was there before stays, and nothing else is left behind.

    Args:
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        InputError: ``path`` cannot be written; says why.

    Examples::
        >>> with atomic_open("rows.json") as file:
        ...     _ = file.write("[]")
    """
    path = os.path.realpath(path)  # a link stays one
    # a device or a pipe, such as /dev/stdout, is written to and not replaced
    partial = path if os.path.exists(path) and not os.path.isfile(path) else f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if partial != path:
                file.flush()
                os.fsync(file.fileno())
                if os.path.exists(path):
                    shutil.copymode(path, partial)
                os.replace(partial, path)
    except OSError as error:
        if error.filename not in (None, path, partial):
            raise  # of another file, which the body reads
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if partial != path:
            with suppress(OSError):
                os.remove(partial)


def write_json(path: str, content) -> None:
    """Write ``content`` as indented JSON, whole or not at all. NumPy's numbers become Python's."""
    with atomic_open(path) as file:
        json.dump(content, file, indent=1, default=float)


def save_figure(figure, path: str, dpi: int) -> None:
    """Write a :class:`matplotlib.figure.Figure` whole or not at all. The ending of ``path`` says in which format."""
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format=os.path.splitext(path)[1][1:].lower(), dpi=dpi)


def prepare_folder(folder: str, name: str | None = None) -> None:
    """Make ``folder`` if it is not there, and see that files can be written to it.

    Args:
        name: what the error says cannot be written, by default the folder.

    Raises:
        InputError: says why not.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # an empty file could be made on a full disk too
    except OSError as error:
        raise InputError(f"cannot write {name or f'to {folder!r}'}: {error.strerror}") from error


def prepare_outputs(*paths: str | None) -> None:
    """Make the folders of ``paths`` and see that the files can be written; None among them is skipped.

    Raises:
        InputError: names the file and what stands in its way.
    """
    for path in filter(None, paths):
        if os.path.isdir(path):
            raise InputError(f"cannot write {path}: it is a folder")
        if os.path.isfile(path) or not os.path.exists(path):  # no device
            prepare_folder(os.path.dirname(path) or ".", path)
