"""Group norm and weight standardization on a CPU: what calls ``cpu_kernels.c``.

That file is compiled when the package is installed. Where no compiler was there, PyTorch's ops do its work.
"""

import ctypes
import warnings
from importlib.util import find_spec

import torch  # before the library is loaded, which then takes PyTorch's OpenMP and its threads where both are GNU's
from torch import Tensor

__all__ = ["is_compiled", "call"]

_TYPES = torch.float32, torch.complex128
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
    """Run a function of ``cpu_kernels.c`` in PyTorch's threads.

    Tensors are contiguous float32, or complex128 for pairs of partial results in float64. None is a null pointer.

    Raises:
        RuntimeError: for a tensor of another type, or whose memory was freed.
    """
    values = []
    for value in arguments:
        if isinstance(value, Tensor):
            tensor, value = value, value.data_ptr()
            if not value or tensor.dtype not in _TYPES:
                raise RuntimeError(f"gng_d2::{name} on a CPU takes float32 tensors that have memory, not {tensor.dtype} at {value:#x}")
        values.append(value)
    _FUNCTIONS[name](*values, torch.get_num_threads())
