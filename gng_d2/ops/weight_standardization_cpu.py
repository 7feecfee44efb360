"""Weight standardization on a CPU: a filter is read from memory once, then found in the cache."""

import torch
from torch import Tensor, nn

from . import cpu_kernels

__all__ = ["DTYPES", "is_faster", "supports", "forward", "backward"]

DTYPES = (torch.float32,)


def is_faster(weight: Tensor) -> bool:
    """Whether this is faster than PyTorch's ops: always, unless torch.compile fuses them."""
    return not torch.compiler.is_compiling()


def supports(weight: Tensor) -> bool:
    """Whether this is a contiguous float32 tensor on the CPU, of at least two weights a filter."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_cpu
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and weight.numel() > weight.shape[0] > 0
        and cpu_kernels.is_compiled()
    )


def forward(weight: Tensor, eps: float) -> Tensor:
    """The standardized weight.

    Shape:
        - weight, output: :math:`(C_{out}, *)`, contiguous float32, of at least two weights a filter
    """
    out = torch.empty_like(weight)
    cpu_kernels.call("standardize", (weight, out), len(weight), weight.numel() // len(weight), eps)
    return out


def backward(gradient: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of ``weight``, from that of the output."""
    out = torch.empty_like(weight)
    cpu_kernels.call("standardize_backward", (gradient, weight, out), len(weight), weight.numel() // len(weight), eps)
    return out
