"""The Triton kernels of group norm, which :mod:`.group_norm_triton` launches.

A program works on one image, a tile of channels and a chunk of positions, or merges the results of such programs.
It computes its offsets into large tensors in int64.
"""

import triton
import triton.language as tl


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
def moments_kernel(
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
def merge_moments_kernel(
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
def _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, channels, num_groups, BLOCK_C: tl.constexpr):
    """Mean, 1 / std, weight and bias of the channels, as columns."""
    group = n * num_groups + c // (channels // num_groups)
    mean = tl.load(mean_ptr + group, mask=c < channels, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < channels, other=0.0)
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    return mean[:, None], rstd[:, None], weight[:, None], bias[:, None]


@triton.jit
def _sigmoid(t):
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def _passed_back(dy, t, ACTIVATION: tl.constexpr):
    """What the activation of t passes back of dy. Of relu, the output may be given for t."""
    if ACTIVATION == "relu":
        dy = tl.where(t <= 0, 0.0, dy)
    elif ACTIVATION == "silu":
        dy = dy * _sigmoid(t) * (1.0 + t * (1.0 - _sigmoid(t)))
    return dy


@triton.jit
def normalize_kernel(
    x_ptr, y_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, positions, stride_c, stride_s,
    num_groups, num_chunks, chunk, ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    n, c, _, start, end = _tile(channels, positions, num_chunks, chunk, BLOCK_C, BLOCK_S)
    mean, rstd, weight, bias = _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, channels, num_groups, BLOCK_C)
    row = n * channels * positions + c.to(tl.int64)[:, None] * stride_c
    for first in range(start, end, BLOCK_S):
        at, inside = _step(row, c, channels, first, end, stride_s, BLOCK_S)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        t = (x - mean) * (rstd * weight) + bias
        if residual_ptr is not None:
            t += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "relu":
            t = tl.where(t < 0, 0.0, t)
        elif ACTIVATION == "silu":
            t = t * _sigmoid(t)
        tl.store(y_ptr + at, t.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    dy_ptr, x_ptr, kept_ptr, dresidual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sums_ptr,
    channels, positions, stride_c, stride_s, num_groups, num_chunks, chunk, all_partials,
    ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sum of dy and of dy z, z the normalized input, of each (image, chunk, channel).

    Here dy is what passes the activation. It is the residual's gradient, and is written where there is a residual.
    """
    n, c, k, start, end = _tile(channels, positions, num_chunks, chunk, BLOCK_C, BLOCK_S)
    mean, rstd, weight, bias = _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, channels, num_groups, BLOCK_C)
    row = n * channels * positions + c.to(tl.int64)[:, None] * stride_c
    sum_dy = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    sum_dyz = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for first in range(start, end, BLOCK_S):
        at, inside = _step(row, c, channels, first, end, stride_s, BLOCK_S)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        t = (x - mean) * (rstd * weight) + bias
        if kept_ptr is not None:
            kept = tl.load(kept_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if ACTIVATION == "relu":
                t = kept
            else:
                t += kept
        dy = _passed_back(dy, t, ACTIVATION)
        if kept_ptr is not None:
            tl.store(dresidual_ptr + at, dy.to(dresidual_ptr.dtype.element_ty), mask=inside)
        sum_dy += dy
        sum_dyz += dy * ((x - mean) * rstd)
    partial = (n * num_chunks + k) * channels + c
    tl.store(sums_ptr + partial, tl.sum(sum_dy, axis=1), mask=c < channels)
    tl.store(sums_ptr + all_partials + partial, tl.sum(sum_dyz, axis=1), mask=c < channels)


@triton.jit
def merge_gradient_sums_kernel(
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
def input_gradient_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group_sums_ptr, channels, positions, stride_c,
    stride_s, num_groups, num_chunks, chunk, all_groups,
    ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The gradient less its mean and its part along z, within each group (Eqs. 14 to 18)."""
    n, c, _, start, end = _tile(channels, positions, num_chunks, chunk, BLOCK_C, BLOCK_S)
    mean, rstd, weight, bias = _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, channels, num_groups, BLOCK_C)
    group = n * num_groups + c // (channels // num_groups)
    mean_dy = tl.load(group_sums_ptr + group, mask=c < channels, other=0.0)[:, None]
    mean_dyz = tl.load(group_sums_ptr + all_groups + group, mask=c < channels, other=0.0)[:, None]
    row = n * channels * positions + c.to(tl.int64)[:, None] * stride_c
    for first in range(start, end, BLOCK_S):
        at, inside = _step(row, c, channels, first, end, stride_s, BLOCK_S)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = _passed_back(dy, (x - mean) * (rstd * weight) + bias, ACTIVATION)
        z = (x - mean) * rstd
        dx = (dy * weight - mean_dy - z * mean_dyz) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
