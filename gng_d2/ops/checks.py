"""What an op checks before it hands tensors to a kernel, which would read whatever lies at their addresses.

Anyone may call an op by itself, and a traced graph may run on other inputs than it was traced with.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["check_readable", "check_shape", "memory_format"]


def check_shape(name: str, tensor: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """Raise RuntimeError where ``tensor`` is missing, has another shape, or lies on another device."""
    if tensor is None:  # an op called with None for a tensor gets it
        raise RuntimeError(f"{name} is missing")
    if tensor.shape != shape or tensor.device != device:
        raise RuntimeError(
            f"{name} has shape {tuple(tensor.shape)} and lies on {tensor.device}; "
            f"this op needs shape {tuple(shape)} on {device}"
        )


def check_readable(tensors: Iterable[Tensor | None], dtypes: Sequence[torch.dtype]) -> None:
    """Raise RuntimeError for a tensor of another type than ``dtypes``, or without memory (empty, or freed)."""
    for t in tensors:
        if t is not None and (t.dtype not in dtypes or not t.data_ptr()):
            raise RuntimeError(
                f"on {t.device.type} this op takes tensors of {' or '.join(map(str, dtypes))} that have memory, "
                f"not {t.dtype} at {t.data_ptr():#x}"
            )


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout in which an op reads ``x`` and returns its output: channels-last if ``x`` is so, else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or not x.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last
