"""The functions of ``cpu_kernels.c``, where that file was compiled.

It is compiled when the package is installed. Where there was no compiler, PyTorch's ops do its work.
"""

import ctypes
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import torch  # before the library is loaded, which then takes PyTorch's OpenMP and its threads where both are GNU's
from torch import Tensor

_POINTER, _INTEGER, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_ARGUMENTS = {
    "group_norm_statistics": [_POINTER] * 4 + [_INTEGER] * 4 + [_NUMBER],
    "group_norm_apply": [_POINTER] * 7 + [_INTEGER] * 7,
    "group_norm_gradients": [_POINTER] * 13 + [_INTEGER] * 7,
    "row_sums": [_POINTER] * 5 + [_INTEGER] * 4,
    "row_gradients": [_POINTER] * 7 + [_INTEGER] * 5,
    "mix_moments": [_POINTER] * 6 + [_INTEGER] * 3,
    "mix_moments_backward": [_POINTER] * 10 + [_INTEGER] * 4,
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
    """Whether :func:`call` can be used."""
    return bool(_FUNCTIONS)


def call(name: str, tensors: Sequence[Tensor | None], *numbers: int | float) -> None:
    """Run the function ``name`` of ``cpu_kernels.c`` in PyTorch's threads.

    It reads and writes the memory of ``tensors`` as its C declaration says, and cannot check them: the caller gives
    contiguous tensors of the right type and size; None is a null pointer. Only ``tensors`` become addresses, and a
    tensor among ``numbers`` is an error.
    """
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    _FUNCTIONS[name](*addresses, *numbers, torch.get_num_threads())
