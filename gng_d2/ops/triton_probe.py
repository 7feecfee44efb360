"""Whether Triton can launch a kernel here, which is known once it launched one."""

import warnings
from functools import cache

import torch

from .backends import HAS_TRITON

if HAS_TRITON:
    import triton

    @triton.jit
    def _nothing_kernel(ptr):
        pass


def triton_works(device_index: int) -> bool:
    """Whether Triton is installed and can launch a kernel on this CUDA device."""
    return HAS_TRITON and _try_triton(device_index)


# torch.compiler.assume_constant_result sets this too, but first imports torch._dynamo, which takes a second.
triton_works._dynamo_marked_constant = True


@cache
def _try_triton(device_index):
    """Triton needs a C compiler when it first launches, which a slim container may not have."""
    try:
        _launch(device_index)
    except Exception as error:  # of any kind: it runs a compiler
        warnings.warn(f"Triton does not work here, so PyTorch's own ops are used: {error}", stacklevel=2)
        return False
    return True


def _launch(device_index):
    with torch.cuda.device(device_index):
        _nothing_kernel[(1,)](torch.zeros(1, device=f"cuda:{device_index}"))
