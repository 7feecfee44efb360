"""Group norm and weight standardization on a CPU: what calls ``cpu_kernels.c``.

That file is compiled when the package is installed. Where no compiler was there, PyTorch's ops do its work.
"""

import ctypes
import warnings
from functools import wraps
from importlib.util import find_spec
from typing import Callable

import torch  # before the library is loaded, which then takes PyTorch's OpenMP and its threads where both are GNU's
from torch import Tensor

__all__ = ["is_compiled", "call", "checked"]

_POINTER, _INTEGER, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_ARGUMENTS = {
    "group_norm": [_POINTER] * 7 + [_INTEGER] * 5 + [_NUMBER],
    "group_norm_backward": [_POINTER] * 9 + [_INTEGER] * 5,
    "standardize": [_POINTER] * 2 + [_INTEGER] * 2 + [_NUMBER],
    "standardize_backward": [_POINTER] * 3 + [_INTEGER] * 2 + [_NUMBER],
}


def _load():
    spec = find_spec(f"{__package__}._cpu_kernels")
    if spec is None:
        return {}
    try:
        library = ctypes.CDLL(spec.origin)
        functions = {name: getattr(library, f"gng_d2_{name}") for name in _ARGUMENTS}
    except (OSError, AttributeError) as error:  # compiled on another system, or from another version
        warnings.warn(f"PyTorch's own ops are used on the CPU, until gng_d2 is installed again: {error}", stacklevel=2)
        return {}
    for name, function in functions.items():
        function.argtypes = [*_ARGUMENTS[name], ctypes.c_int]
    return functions


_FUNCTIONS = _load()


def is_compiled() -> bool:
    return bool(_FUNCTIONS)


def call(name: str, *arguments) -> None:
    """Run a function of ``cpu_kernels.c`` in PyTorch's threads. Tensors are contiguous; None is a null pointer."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    _FUNCTIONS[name](*values, torch.get_num_threads())


def checked(kernel: Callable) -> Callable:
    """``kernel`` as an op, to which a traced graph may hand other tensors than it was traced with.

    Raises:
        RuntimeError: for a tensor that is not float32, or whose memory was freed.
    """

    @wraps(kernel)
    def run(*arguments):
        for t in arguments:
            if isinstance(t, Tensor) and (t.dtype != torch.float32 or not t.data_ptr()):
                raise RuntimeError(
                    f"on a CPU this takes float32 tensors that have memory, not {t.dtype} at {t.data_ptr():#x}"
                )
        return kernel(*arguments)

    return run
