"""Files of weights are read without running code that they hold, and written whole or not at all.

A pickle is a program. One that needs more than data is refused, unless the user trusts its files.
"""

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


def files_are_trusted() -> bool:
    """Whether files may run code of their own on reading, as the tools' flag ``--trust-files`` allows.

    The flag sets the environment variable GNG_D2_TRUST_FILES to 1, so that the processes of a job have it too.
    """
    return os.environ.get("GNG_D2_TRUST_FILES") == "1"


def read_weight_file(path: str, pickled: bool = False) -> Any:
    """What a file of weights holds, with tensors on the CPU. Nothing of it is run.

    A .pkl is a pickle of NumPy arrays, numbers, texts and containers of them, as Detectron2 and Caffe2 write it. A
    .safetensors holds tensors alone. Any other file is one of ``torch.save``; its checksums are compared, which
    ``torch.load`` does not do.

    Args:
        pickled: the file is a pickle, whatever its name.

    Raises:
        InputError: there is no such file, it is damaged, or it holds more than data and ``--trust-files`` is not set.
    """
    try:
        with open(path, "rb") as file:
            if pickled or path.endswith(".pkl"):
                reader = pickle.Unpickler if files_are_trusted() else _DataUnpickler
                return reader(file, encoding="latin1").load()  # the encoding of Python 2's files
            if path.endswith(".safetensors"):
                from safetensors.torch import load_file  # which no other format needs

                return load_file(path)
            if any(file.read(512)) and tarfile.is_tarfile(path):
                # the format of before 2017: up to PyTorch 2.5, weights_only did not keep its code from running
                raise InputError(f"{path} is a tar archive. Only what torch.save wrote is read")
        if zipfile.is_zipfile(path):  # PyTorch's format of before 2020 is no archive and has no checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise InputError(f"{path} is damaged: its checksums are not those of its content")
        return torch.load(path, map_location="cpu", weights_only=not files_are_trusted())
    except (InputError, MemoryError):
        raise
    except ImportError as error:
        raise InputError(f"{path}: to read it, install {error.name}") from None
    except Exception as error:  # damaged files have raised a dozen kinds
        raise _unreadable(path, error) from None


def _unreadable(path, error):
    if isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError)):  # torch raises other OSErrors
        return InputError(f"cannot read {path}: {error.strerror}")
    # PyTorch's text is not passed on, because it proposes to run the file
    wanted = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and wanted:
        return InputError(
            f"{path} holds more than data: it asks for {wanted[1]}, which would run code on reading. Nothing of it was "
            f"run. Where you trust its source, --trust-files opens it all the same"
        )
    return InputError(
        f"{path} cannot be read as weights ({type(error).__name__}). It is damaged, cut off or another kind of file"
    )


class _DataUnpickler(pickle.Unpickler):
    """Finds the functions that make NumPy arrays, numbers, texts and containers, and no others."""

    def find_class(self, module, name):
        try:
            make = _DATA[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}") from None
        # a pickle can set attributes of a Python function, so it gets another one than NumPy's own
        return make if isinstance(make, type) else lambda *args: make(*args)


def _latin1(text, encoding):
    """Makes bytes in a pickle that Python 3 wrote in the format of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


_BUILTINS = (set, frozenset, complex, bytes, bytearray, int, float, str, bool, list, tuple, dict)
_DATA: dict[tuple[str, str], Any] = {
    **{(module, made.__name__): made for module in ("builtins", "__builtin__") for made in _BUILTINS},  # Python 3 and 2
    **{("collections", made.__name__): made for made in (OrderedDict, defaultdict)},
    **{("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _latin1},
}
for _core in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
    _DATA[f"{_core}.multiarray", "_reconstruct"] = np.zeros(1).__reduce__()[0]
    _DATA[f"{_core}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
    _DATA[f"{_core}.numeric", "_frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]


def save_weight_file(path: str, content: Any) -> None:
    """``torch.save`` to a file that appears under its name when it is whole.

    Raises:
        InputError: ``path`` cannot be written.
    """
    with atomic_open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch raises it in place of the error of a full disk, say
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
