"""Group norm on a GPU in a time that does not depend on the number of groups.

Reductions run over (image, tile of channels, chunk of positions), so that they fill the machine whatever the
number of groups is. The groups enter when the small per-channel results are merged. Every partial result has
one writer and every sum a fixed order: the same input gives the same bits.

The forward pass reads the data twice and writes it once; the backward pass makes five passes over the data, with or
without an activation. With a residual these are four and, if an activation follows it, seven. Everything is computed in
float32. Tensors are contiguous or channels-last and keep their layout.
"""

import torch
import triton
from torch import Tensor

from .checks import memory_format
from .group_norm_triton_kernels import (
    gradient_sums_kernel,
    input_gradient_kernel,
    merge_gradient_sums_kernel,
    merge_moments_kernel,
    moments_kernel,
    normalize_kernel,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
READS_CHANNELS_LAST = True

# A group of fewer elements is read by one thread block in about the time that our additional launches take.
_MIN_GROUP = 2**15
_TILE = 2048  # elements that a program holds at a time
_MERGED = 1024, 16384  # partial results that a program merges at a time: few, many
_PROGRAMS_PER_MULTIPROCESSOR = 4


def is_faster(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, fused: bool = False
) -> bool:
    """Whether this is faster on CUDA than PyTorch's op, which copies some inputs and fills the GPU only with groups.

    ``fused``: with an activation or a residual, whose passes over the data it saves. No GPU has measured that.
    """
    if x.dim() < 2:
        return False
    if _keeps_dtype(x, weight, bias) or memory_format(x) != torch.contiguous_format:
        return True
    if fused:
        return x.numel() >= _MIN_GROUP
    thread_blocks = x.shape[0] * num_groups
    return thread_blocks < _multiprocessors(x.device) and x.numel() >= thread_blocks * _MIN_GROUP


def _keeps_dtype(x, weight, bias):
    """Whether PyTorch's op would return float32 for this float16 or bfloat16 input, where this returns its type."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    wide = any(isinstance(p, Tensor) and p.dtype != x.dtype for p in (weight, bias))
    return wide or torch.is_autocast_enabled("cuda")


def statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and 1 / std of each group, in float32.

    Shape:
        - x: :math:`(N, C, *)`, contiguous or channels-last, at least one element; float32, float16 or bfloat16
        - mean, 1 / std: :math:`(N, G)`
    """
    grid = _Grid(x)
    partial = x.new_empty((2, grid.images, grid.num_chunks, grid.channels), dtype=torch.float32)
    mean = x.new_empty((grid.images, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    groups = grid.images * num_groups
    with _on(x):
        moments_kernel[grid.programs](x, partial[0], partial[1], *grid.layout, *grid.chunks, *grid.blocks)
        merge_moments_kernel[(groups,)](
            partial[0], partial[1], mean, rstd, eps, grid.channels, grid.positions, num_groups, *grid.chunks,
            **_merge_options(partial[0].numel() // groups)
        )  # fmt: skip
    return mean, rstd


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The output, in the type and layout of ``x``, with the statistics of :func:`statistics`.

    Shape:
        - x, residual, output: :math:`(N, C, *)`, in the same layout
        - weight, bias: :math:`(C)`, contiguous, of any of these types
    """
    grid, y = _Grid(x), torch.empty_like(x)
    with _on(x):
        normalize_kernel[grid.programs](
            x, y, residual, mean, rstd, weight, bias, *grid.layout, num_groups, *grid.chunks, activation, *grid.blocks
        )
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    num_groups: int,
    activation: str | None = None,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias (both in float32), and with ``kept`` that of the residual.

    Those of x and the residual have the type and layout of x.

    Shape:
        - dy, kept: that of x, in its layout. ``kept`` is what an activation after a residual needs: the output for
          relu, else the residual
        - others: as in :func:`apply`
    """
    grid = _Grid(x)
    sums = x.new_empty((2, grid.images, grid.num_chunks, grid.channels), dtype=torch.float32)
    group_sums = x.new_empty((2, *mean.shape), dtype=torch.float32)
    dx, dresidual = torch.empty_like(x), None if kept is None else torch.empty_like(x)
    partials, groups = sums[0].numel(), mean.numel()
    with _on(x):
        gradient_sums_kernel[grid.programs](
            dy, x, kept, dresidual, mean, rstd, weight, bias, sums,
            *grid.layout, num_groups, *grid.chunks, partials, activation, *grid.blocks
        )  # fmt: skip
        merge_gradient_sums_kernel[(groups,)](
            sums, weight, group_sums, grid.channels, grid.positions, num_groups, grid.num_chunks, partials, groups,
            **_merge_options(partials // groups)
        )  # fmt: skip
        if kept is not None:  # what passed the activation was written
            dy, activation = dresidual, None
        input_gradient_kernel[grid.programs](
            dy, x, dx, mean, rstd, weight, bias, group_sums,
            *grid.layout, num_groups, *grid.chunks, groups, activation, *grid.blocks
        )  # fmt: skip
    return dx, sums[1].sum((0, 1)), sums[0].sum((0, 1)), dresidual


def _merge_options(partials):
    few, many = _MERGED
    return {"BLOCK": few, "num_warps": 4} if partials <= few else {"BLOCK": many, "num_warps": 16}


class _Grid:
    """How the programs of a kernel share a tensor."""

    def __init__(self, x):
        self.images, self.channels = x.shape[:2]
        self.positions = x[0, 0].numel()
        contiguous = x.is_contiguous()
        stride_c, stride_s = (self.positions, 1) if contiguous else (1, self.channels)
        self.layout = self.channels, self.positions, stride_c, stride_s
        # the longer side of a tile along neighbours in memory
        if contiguous and self.positions > 1:
            block_s = min(triton.next_power_of_2(self.positions), _TILE)
            block_c = min(triton.next_power_of_2(self.channels), _TILE // block_s)
        else:
            block_c = min(triton.next_power_of_2(self.channels), 64)
            block_s = min(triton.next_power_of_2(self.positions), _TILE // block_c)
        self.blocks = block_c, block_s
        tiles = self.images * triton.cdiv(self.channels, block_c)
        wanted = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(x.device), tiles)
        steps = triton.cdiv(self.positions, block_s)
        chunk = triton.cdiv(steps, min(steps, wanted)) * block_s
        self.num_chunks = triton.cdiv(self.positions, chunk)
        self.chunks = self.num_chunks, chunk
        self.programs = (tiles * self.num_chunks,)


def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _on(x):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
