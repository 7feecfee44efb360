"""Weight standardization on a CPU: a filter is read from memory once, then found in the cache."""

import torch
from torch import Tensor

from . import cpu_kernels

DTYPES = (torch.float32,)


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
