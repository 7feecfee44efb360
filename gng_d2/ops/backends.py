"""What PyTorch is doing with an op, and whether Triton works: may a kernel of ours run?"""

import warnings
from functools import lru_cache
from typing import Optional

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["HAS_OPS", "HAS_TRITON", "TRITON_TYPES", "is_plain", "is_transformed", "triton_works"]

# Older versions of PyTorch have no way to register an op that torch.compile can go through.
HAS_OPS = hasattr(torch.library, "register_fake")
try:
    from . import group_norm_triton

    HAS_TRITON = HAS_OPS
except ImportError:  # Triton is not made for every platform
    HAS_TRITON = False

TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_transformed() -> bool:
    """Under torch.jit.trace, torch.export, torch.func or forward-mode differentiation, which want PyTorch's own ops."""
    if torch.compiler.is_compiling():
        return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(*tensors: Optional[Tensor]) -> bool:
    """Whether the dispatcher has nothing to do: no mode watches ops, no subclass, lazy negation or missing memory."""
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_neg() and t.data_ptr()) for t in tensors
    )


def triton_works(device_index: int) -> bool:
    return _try_triton(device_index)


if HAS_OPS:
    torch.compiler.assume_constant_result(triton_works)


@lru_cache(maxsize=None)
def _try_triton(device_index):
    """Triton needs a C compiler when it first launches, which a slim container may not have."""
    try:
        group_norm_triton.forward(torch.zeros(1, 1, 2, device=f"cuda:{device_index}"), None, None, 1, 1e-5)
    except Exception as error:  # of any kind: it runs a compiler
        warnings.warn(f"Triton does not work here, so PyTorch's own ops are used: {error}", stacklevel=2)
        return False
    return True
