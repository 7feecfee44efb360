"""Files of weights: read without running what they hold, and written so that damage is noticed.

A pickle is a program. What can be data alone is read as data alone; a file that wants more is refused, unless the
user trusts it. torch.load does not look at the checksums in its own files, so they are compared here.
"""

import hashlib
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch

from gng_d2.errors import InputError

from .files import atomic_open

__all__ = ["files_are_trusted", "read_weight_file", "read_pickle", "save_weight_file"]


def files_are_trusted() -> bool:
    """Whether files may run code of their own on reading: the tools' flag ``--trust-files``.

    It is kept in the environment variable GNG_D2_TRUST_FILES, "1", so that the processes of a job have it too.
    """
    return os.environ.get("GNG_D2_TRUST_FILES") == "1"


def read_weight_file(path: str) -> Any:
    """What is in a file of weights, with tensors on the CPU. Nothing of it is run.

    A .pkl is a pickle (:func:`read_pickle`); any other file is what ``torch.save`` wrote.

    Raises:
        InputError: there is no such file, it is damaged, or it holds more than data and ``--trust-files`` is not set.
    """
    return read_pickle(path) if path.endswith(".pkl") else _read(path, _read_torch)


def read_pickle(path: str) -> Any:
    """What is in a pickle of NumPy arrays, numbers, texts and containers of them, as Detectron2's and Caffe2's are.

    Raises:
        InputError: as :func:`read_weight_file`.
    """
    return _read(path, _read_pickle)


def _read(path, read):
    try:
        return read(path)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged file has raised a dozen kinds
        if isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError)):  # torch raises other OSErrors
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        # PyTorch's text is not passed on, because it proposes to run the file
        wanted = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise _refusal(path, wanted.group(1)) from None
        raise InputError(
            f"{path} cannot be read as weights ({type(error).__name__}). It is damaged, cut off or another kind of file"
        ) from None


def _refusal(path, wanted):
    return InputError(
        f"{path} holds more than data: it asks for {wanted}, which would run code on reading. Nothing of it was run. "
        f"Where you trust its source, --trust-files opens it all the same"
    )


def _read_torch(path):
    with open(path, "rb") as file:
        if any(file.read(512)) and tarfile.is_tarfile(path):
            # PyTorch's format of before 2017: up to 2.5, weights_only did not hold it back
            raise InputError(f"{path} is a tar archive. Only what torch.save wrote is read")
    _compare_checksums(path)
    return torch.load(path, map_location="cpu", weights_only=not files_are_trusted())


def _read_pickle(path):
    with open(path, "rb") as file:
        if files_are_trusted():
            return pickle.load(file, encoding="latin1")
        reader = _DataUnpickler(file, encoding="latin1")  # for the files of Python 2
        reader.path = path
        return reader.load()


class _DataUnpickler(pickle.Unpickler):
    """Knows what NumPy arrays, numbers, texts and containers are made by, and nothing else."""

    def find_class(self, module, name):
        try:
            make = _DATA[module, name]
        except KeyError:
            raise _refusal(self.path, f"{module}.{name}") from None
        # a pickle can set the attributes of a Python function: they shall not be those of NumPy's own
        return make if isinstance(make, type) else lambda *args: make(*args)


def _latin1(text, encoding):
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


def _data_globals() -> dict[tuple, Any]:
    found = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _latin1}
    found.update({("collections", made.__name__): made for made in (OrderedDict, defaultdict)})
    for builtins in ("builtins", "__builtin__"):  # of Python 3 and 2
        for made in (set, frozenset, complex, bytes, bytearray, int, float, str, bool, list, tuple, dict):
            found[builtins, made.__name__] = made
    array, scalar = np.zeros(1), np.float64(0)
    for core in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
        found[f"{core}.multiarray", "_reconstruct"] = array.__reduce__()[0]
        found[f"{core}.multiarray", "scalar"] = scalar.__reduce__()[0]
        found[f"{core}.numeric", "_frombuffer"] = array.__reduce_ex__(5)[0]
    return found


_DATA = _data_globals()

# torch.save writes a zip archive. Ours ends in this comment, with the digest of all that stands before it
_MARK = b"gng_d2 sha256 "
_TRAILER = 2 + len(_MARK) + 64  # a comment's length in two bytes, the comment


def save_weight_file(path: str, content: Any) -> None:
    """``torch.save`` that appears under its name when it is whole, with a checksum that reading compares.

    Any ``torch.load`` reads it.

    Raises:
        InputError: ``path`` cannot be written.
    """
    with atomic_open(path, "wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(content, hashing)
        except RuntimeError as error:  # PyTorch's, which takes the place of what stopped the file
            raise hashing.error or error from None
        file.seek(-2, os.SEEK_END)
        file.write(_trailer(hashing.sha256))


def _trailer(sha256):
    comment = _MARK + sha256.hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


class _HashingFile:
    """A file to write that knows the digest of what was written."""

    def __init__(self, file):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, content):
        self.sha256.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def _compare_checksums(path):
    if not zipfile.is_zipfile(path):
        return  # PyTorch's format of before 2020 has none
    with open(path, "rb") as file:
        content = file.seek(0, os.SEEK_END) - _TRAILER
        file.seek(max(content, 0))
        trailer = file.read()
        if content > 0 and trailer[2:].startswith(_MARK):
            file.seek(0)
            sha256 = hashlib.sha256()
            while content:
                block = file.read(min(content, 2**20))
                sha256.update(block)
                content -= len(block)
            sha256.update(b"\0\0")  # as torch.save had written the length of its comment
            if _trailer(sha256) == trailer:
                return
            raise InputError(f"{path} is damaged: its checksum is not that of its content")
    try:
        with zipfile.ZipFile(path) as archive:
            whole = not archive.comment and archive.testzip() is None
    except Exception:  # a damaged header has raised five kinds
        whole = False
    if not whole:
        raise InputError(f"{path} is damaged: its checksums are not those of its content")
