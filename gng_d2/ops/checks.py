"""What keeps tensors from a kernel, which would read whatever lies at their addresses.

A function asks before it picks a kernel. An op asks again: anyone may call it by itself, and a traced graph may run on
other inputs than it was traced with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def fault_of(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
) -> str | None:
    """What is wrong with a tensor, None if nothing is: it is missing, or has another shape, device or type.

    A fake tensor may have any type: ``dtypes`` is None for it.
    """
    if tensor is None:  # an op called with None for a tensor gets it
        return f"{name} is missing"
    if tensor.shape == shape and tensor.device == device and (dtypes is None or tensor.dtype in dtypes):
        return None
    types = "" if dtypes is None else f" and {' or '.join(map(str, dtypes))}"
    return (
        f"{name} has shape {tuple(tensor.shape)} and {tensor.dtype} and lies on {tensor.device}; "
        f"this op needs shape {tuple(shape)}{types} on {device}"
    )


def refuse(fault: str | None) -> None:
    """Raise RuntimeError if there is a fault."""
    if fault is not None:
        raise RuntimeError(fault)


def check_memory(*tensors: Tensor | None) -> None:
    """Raise RuntimeError for a tensor without memory, which is empty or was freed."""
    for t in tensors:
        if t is not None and not t.data_ptr():
            raise RuntimeError(f"this op takes tensors that have memory: one of shape {tuple(t.shape)} has none")


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout in which an op reads ``x`` and returns its output: channels-last if ``x`` is so, else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or not x.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last
