"""Weight standardization on a GPU: one kernel forward, one backward, a program for each filter.

The backward pass computes the moments again: a filter is in the cache then, and nothing but the weight is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MAX_BLOCK = 4096


@triton.jit
def _load(row_ptr, first, size, BLOCK: tl.constexpr):
    """BLOCK of a filter from ``first`` on: where, whether there, and what."""
    i = first + tl.arange(0, BLOCK)
    return i, i < size, tl.load(row_ptr + i, mask=i < size, other=0.0).to(tl.float32)


@triton.jit
def _moments(row_ptr, size, BLOCK: tl.constexpr):
    """Mean and unbiased standard deviation of a filter."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        _, _, x = _load(row_ptr, first, size, BLOCK)
        total += x
    mean = tl.sum(total, axis=0) / size
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        _, inside, x = _load(row_ptr, first, size, BLOCK)
        deviation = tl.where(inside, x - mean, 0.0)
        total += deviation * deviation
    return mean, tl.sqrt(tl.sum(total, axis=0) / (size - 1))


@triton.jit
def _standardize_kernel(x_ptr, y_ptr, eps, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    mean, std = _moments(x_ptr + row, size, BLOCK)
    for first in range(0, size, BLOCK):
        i, inside, x = _load(x_ptr + row, first, size, BLOCK)
        tl.store(y_ptr + row + i, ((x - mean) / (std + eps)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(dy_ptr, x_ptr, dx_ptr, eps, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    mean, std = _moments(x_ptr + row, size, BLOCK)
    sum_dy = tl.zeros([BLOCK], tl.float32)
    sum_dy_x = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        _, _, dy = _load(dy_ptr + row, first, size, BLOCK)
        _, _, x = _load(x_ptr + row, first, size, BLOCK)
        sum_dy += dy
        sum_dy_x += dy * (x - mean)
    mean_dy = tl.sum(sum_dy, axis=0) / size
    scale = 1.0 / (std + eps)
    # where all weights of a filter are equal, the sum is 0 and so may be divided by 1
    x_factor = tl.sum(sum_dy_x, axis=0) * scale / (tl.where(std > 0, std, 1.0) * (size - 1))
    for first in range(0, size, BLOCK):
        i, inside, dy = _load(dy_ptr + row, first, size, BLOCK)
        _, _, x = _load(x_ptr + row, first, size, BLOCK)
        dx = (dy - mean_dy - (x - mean) * x_factor) * scale
        tl.store(dx_ptr + row + i, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def forward(weight: Tensor, eps: float) -> Tensor:
    """The standardized weight, computed in float32.

    Shape:
        - weight, output: :math:`(C_{out}, *)`, contiguous, of at least two weights a filter
    """
    out = torch.empty_like(weight)
    _launch(_standardize_kernel, weight, out, eps=eps)
    return out


def backward(gradient: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of ``weight``, from that of the output."""
    out = torch.empty_like(weight)
    _launch(_gradient_kernel, gradient, weight, out, eps=eps)
    return out


def _launch(kernel, *tensors, eps):
    filters, size = len(tensors[0]), tensors[0][0].numel()
    block = min(triton.next_power_of_2(size), _MAX_BLOCK)
    with torch.cuda.device(tensors[0].device if tensors[0].is_cuda else -1):  # Triton launches on the current one
        kernel[(filters,)](*tensors, eps, size, BLOCK=block)
