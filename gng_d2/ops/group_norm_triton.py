"""Group norm on a GPU in a time that does not depend on the number of groups.

Reductions run over (image, tile of channels, chunk of positions), so that they fill the machine whatever the
number of groups is. The groups enter when the small per-channel results are merged. Every partial result has
one writer and every sum a fixed order: the same input gives the same bits.

Three passes over the data forward (moments, read, write), five backward. Everything is computed in float32.
Tensors are contiguous or channels-last and keep their layout.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import triton_works
from .checks import memory_format

__all__ = ["DTYPES", "is_faster", "supports", "forward", "backward"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A group of fewer elements is read by one thread block in about the time that our additional launches take.
_MIN_GROUP = 2**15
_TILE = 2048  # elements that a program holds at a time
_MERGED = 1024, 16384  # partial results that a program merges at a time: few, many
_PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _tile(channels, positions, num_chunks, chunk, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The image, channels and positions of this program; its positions go in steps of BLOCK_S."""
    program = tl.program_id(0)
    k = program % num_chunks
    tiles = tl.cdiv(channels, BLOCK_C)
    c = (program // num_chunks) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (program // num_chunks // tiles).to(tl.int64)
    start = k * chunk
    return n, c, k, start, tl.minimum(start + chunk, positions)


@triton.jit
def _step(row, c, channels, first, end, stride_s, BLOCK_S: tl.constexpr):
    """Offsets of the BLOCK_S positions from ``first`` on in each row, and which of them there are."""
    s = first + tl.arange(0, BLOCK_S)
    return row + s.to(tl.int64)[None, :] * stride_s, (c < channels)[:, None] & (s < end)[None, :]


@triton.jit
def _moments_kernel(
    x_ptr, mean_ptr, m2_ptr, channels, positions, stride_c, stride_s, num_chunks, chunk,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and M2, the sum of squared deviations, of each (image, chunk, channel), by Welford's method."""
    n, c, k, start, end = _tile(channels, positions, num_chunks, chunk, BLOCK_C, BLOCK_S)
    row = n * channels * positions + c.to(tl.int64)[:, None] * stride_c
    lane = tl.arange(0, BLOCK_S)
    mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    seen = 0.0
    for first in range(start, end, BLOCK_S):
        at, inside = _step(row, c, channels, first, end, stride_s, BLOCK_S)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        seen += 1.0
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta / seen
        m2 += delta * (x - mean)
    count = ((end - start - lane + BLOCK_S - 1) // BLOCK_S).to(tl.float32)[None, :]
    # relative to one of them: sums of large means would be rounded
    first_mean = tl.sum(tl.where(lane == 0, mean, 0.0), axis=1)
    chunk_mean = first_mean + tl.sum((mean - first_mean[:, None]) * count, axis=1) / (end - start)
    deviation = mean - chunk_mean[:, None]
    chunk_m2 = tl.sum(m2 + count * deviation * deviation, axis=1)
    partial = (n * num_chunks + k) * channels + c
    tl.store(mean_ptr + partial, chunk_mean, mask=c < channels)
    tl.store(m2_ptr + partial, chunk_m2, mask=c < channels)


@triton.jit
def _partial_moments(mean_ptr, m2_ptr, first, channels, size, positions, num_chunks, chunk, BLOCK: tl.constexpr):
    """BLOCK of a group's partial results from ``first`` on: count, mean and M2; count 0 where there are no more."""
    i = first + tl.arange(0, BLOCK)
    inside = i < size * num_chunks
    k = i // size
    count = tl.where(inside, tl.minimum(chunk, positions - k * chunk), 0).to(tl.float32)
    at = k * channels + i % size
    return count, tl.load(mean_ptr + at, mask=inside, other=0.0), tl.load(m2_ptr + at, mask=inside, other=0.0)


@triton.jit
def _merge_moments_kernel(
    chunk_mean_ptr, chunk_m2_ptr, mean_ptr, rstd_ptr, eps, channels, positions, num_groups, num_chunks, chunk,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / std of each (image, group), from those of its channels and chunks."""
    n = tl.program_id(0).to(tl.int64) // num_groups
    g = tl.program_id(0) % num_groups
    size = channels // num_groups
    partials = n * num_chunks * channels + g * size
    chunk_mean_ptr += partials
    chunk_m2_ptr += partials
    first_mean = tl.load(chunk_mean_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size * num_chunks, BLOCK):
        count, mean, m2 = _partial_moments(
            chunk_mean_ptr, chunk_m2_ptr, first, channels, size, positions, num_chunks, chunk, BLOCK
        )
        total += count * (mean - first_mean)
    elements = size.to(tl.float32) * positions
    group_mean = first_mean + tl.sum(total, axis=0) / elements
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size * num_chunks, BLOCK):
        count, mean, m2 = _partial_moments(
            chunk_mean_ptr, chunk_m2_ptr, first, channels, size, positions, num_chunks, chunk, BLOCK
        )
        deviation = tl.where(count > 0, mean - group_mean, 0.0)
        total += m2 + count * deviation * deviation
    variance = tl.sum(total, axis=0) / elements
    tl.store(mean_ptr + tl.program_id(0), group_mean)
    tl.store(rstd_ptr + tl.program_id(0), 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _normalize_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, positions, stride_c, stride_s,
    num_groups, num_chunks, chunk, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    n, c, k, start, end = _tile(channels, positions, num_chunks, chunk, BLOCK_C, BLOCK_S)
    group = n * num_groups + c // (channels // num_groups)
    mean = tl.load(mean_ptr + group, mask=c < channels, other=0.0)
    scale = tl.load(rstd_ptr + group, mask=c < channels, other=0.0)
    shift = tl.zeros([BLOCK_C], tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    row = n * channels * positions + c.to(tl.int64)[:, None] * stride_c
    for first in range(start, end, BLOCK_S):
        at, inside = _step(row, c, channels, first, end, stride_s, BLOCK_S)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean[:, None]) * scale[:, None] + shift[:, None]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, sums_ptr, channels, positions, stride_c, stride_s,
    num_groups, num_chunks, chunk, all_partials, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sum of dy and of dy z, z the normalized input, of each (image, chunk, channel)."""
    n, c, k, start, end = _tile(channels, positions, num_chunks, chunk, BLOCK_C, BLOCK_S)
    group = n * num_groups + c // (channels // num_groups)
    mean = tl.load(mean_ptr + group, mask=c < channels, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < channels, other=0.0)
    row = n * channels * positions + c.to(tl.int64)[:, None] * stride_c
    sum_dy = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    sum_dyz = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for first in range(start, end, BLOCK_S):
        at, inside = _step(row, c, channels, first, end, stride_s, BLOCK_S)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sum_dy += dy
        sum_dyz += dy * ((x - mean[:, None]) * rstd[:, None])
    partial = (n * num_chunks + k) * channels + c
    tl.store(sums_ptr + partial, tl.sum(sum_dy, axis=1), mask=c < channels)
    tl.store(sums_ptr + all_partials + partial, tl.sum(sum_dyz, axis=1), mask=c < channels)


@triton.jit
def _merge_gradient_sums_kernel(
    sums_ptr, weight_ptr, group_sums_ptr, channels, positions, num_groups, num_chunks, all_partials, all_groups,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean of weight dy and of weight dy z over each (image, group)."""
    n = tl.program_id(0).to(tl.int64) // num_groups
    g = tl.program_id(0) % num_groups
    size = channels // num_groups
    partials = sums_ptr + n * num_chunks * channels
    total_dy = tl.zeros([BLOCK], tl.float32)
    total_dyz = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size * num_chunks, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < size * num_chunks
        c = g * size + i % size
        at = i // size * channels + c
        dy = tl.load(partials + at, mask=inside, other=0.0)
        dyz = tl.load(partials + all_partials + at, mask=inside, other=0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
            dy *= weight
            dyz *= weight
        total_dy += dy
        total_dyz += dyz
    elements = size.to(tl.float32) * positions
    tl.store(group_sums_ptr + tl.program_id(0), tl.sum(total_dy, axis=0) / elements)
    tl.store(group_sums_ptr + all_groups + tl.program_id(0), tl.sum(total_dyz, axis=0) / elements)


@triton.jit
def _input_gradient_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, group_sums_ptr, channels, positions, stride_c, stride_s,
    num_groups, num_chunks, chunk, all_groups, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The gradient less its mean and its part along z, within each group (Eqs. 14 to 18)."""
    n, c, k, start, end = _tile(channels, positions, num_chunks, chunk, BLOCK_C, BLOCK_S)
    group = n * num_groups + c // (channels // num_groups)
    mean = tl.load(mean_ptr + group, mask=c < channels, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < channels, other=0.0)
    mean_dy = tl.load(group_sums_ptr + group, mask=c < channels, other=0.0)
    mean_dyz = tl.load(group_sums_ptr + all_groups + group, mask=c < channels, other=0.0)
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    row = n * channels * positions + c.to(tl.int64)[:, None] * stride_c
    for first in range(start, end, BLOCK_S):
        at, inside = _step(row, c, channels, first, end, stride_s, BLOCK_S)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = (x - mean[:, None]) * rstd[:, None]
        dx = (dy * weight[:, None] - mean_dy[:, None] - z * mean_dyz[:, None]) * rstd[:, None]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def is_faster(x: Tensor, num_groups: int, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None) -> bool:
    """Whether this is faster on CUDA than PyTorch's op, which copies some inputs and fills the GPU only with groups."""
    if not x.is_cuda or x.dim() < 2:
        return False
    if _keeps_dtype(x, weight, bias) or memory_format(x) != torch.contiguous_format:
        return True
    thread_blocks = x.shape[0] * num_groups
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return thread_blocks < multiprocessors and x.numel() >= thread_blocks * _MIN_GROUP


def _keeps_dtype(x, weight, bias):
    """Whether PyTorch's op would return float32 for this float16 or bfloat16 input, where this returns its type."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    wide = any(isinstance(p, Tensor) and p.dtype != x.dtype for p in (weight, bias))
    return wide or torch.is_autocast_enabled("cuda")


def supports(x: Tensor, num_groups: int, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None) -> bool:
    """Whether these are CUDA tensors of types and shapes that this takes, and Triton works.

    Parameters have the type of the input, or are float32 beside a float16 or bfloat16 input.
    """
    if not x.is_cuda or x.dtype not in DTYPES or x.dim() < 2 or x.shape[1] % num_groups:
        return False
    if x.numel() <= num_groups:  # PyTorch refuses a single number
        return False
    affine = [p for p in (weight, bias) if p is not None]
    if not all(isinstance(p, Tensor) and p.shape == x.shape[1:2] and p.device == x.device for p in affine):
        return False
    if not all(p.dtype == x.dtype for p in affine) and not all(p.dtype == torch.float32 for p in affine):
        return False
    return triton_works(x.device.index)


def forward(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], num_groups: int, eps: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """Output in the type and layout of ``x``, mean and 1 / std in float32.

    Shape:
        - x: :math:`(N, C, *)`, contiguous or channels-last, at least one element; float32, float16 or bfloat16
        - weight, bias: :math:`(C)`, contiguous, of any of these types
        - output: as x; mean, 1 / std: :math:`(N, G)`
    """
    grid = _Grid(x)
    partial = x.new_empty((2, grid.images, grid.num_chunks, grid.channels), dtype=torch.float32)
    mean = x.new_empty((grid.images, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    y = torch.empty_like(x)
    groups = grid.images * num_groups
    with _on(x):
        _moments_kernel[grid.programs](x, partial[0], partial[1], *grid.layout, *grid.chunks, *grid.blocks)
        _merge_moments_kernel[(groups,)](
            partial[0], partial[1], mean, rstd, eps, grid.channels, grid.positions, num_groups, *grid.chunks,
            **_merge_options(partial[0].numel() // groups)
        )  # fmt: skip
        _normalize_kernel[grid.programs](
            x, y, mean, rstd, weight, bias, *grid.layout, num_groups, *grid.chunks, *grid.blocks
        )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Optional[Tensor], num_groups: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in its type and layout), weight and bias (both in float32).

    Shape:
        - dy: that of x, in its layout
        - others: as :func:`forward` takes and returns them
    """
    grid = _Grid(x)
    sums = x.new_empty((2, grid.images, grid.num_chunks, grid.channels), dtype=torch.float32)
    group_sums = x.new_empty((2, *mean.shape), dtype=torch.float32)
    dx = torch.empty_like(x)
    partials, groups = sums[0].numel(), mean.numel()
    with _on(x):
        _gradient_sums_kernel[grid.programs](
            dy, x, mean, rstd, sums, *grid.layout, num_groups, *grid.chunks, partials, *grid.blocks
        )
        _merge_gradient_sums_kernel[(groups,)](
            sums, weight, group_sums, grid.channels, grid.positions, num_groups, grid.num_chunks, partials, groups,
            **_merge_options(partials // groups)
        )  # fmt: skip
        _input_gradient_kernel[grid.programs](
            dy, x, dx, mean, rstd, weight, group_sums, *grid.layout, num_groups, *grid.chunks, groups, *grid.blocks
        )
    return dx, sums[1].sum((0, 1)), sums[0].sum((0, 1))


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
