"""Group norm on a CPU with fewer groups than threads.

PyTorch's own gives each (image, group) to one thread. Here the threads share a group: sums and norms of short
rows, merged in float64, then PyTorch's batch norm in evaluation mode as the affine map of each channel.
"""

from functools import lru_cache
from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["pays", "forward", "backward"]

# from tools/benchmark_norm.py: below, what Python adds is more than what a second thread takes away
_MIN_ELEMENTS = 2**18
# Sums of squares lose the variance of features with a large mean: beyond 4 deviations PyTorch's own is used.
_MAX_SQUARED_MEAN = 16.0
_MAX_ROW = 2048  # terms that are summed in float32


def pays(x: Tensor, num_groups: int) -> bool:
    """Whether :func:`forward` is faster than PyTorch's own op for ``x``."""
    return (
        x.dtype == torch.float32
        and x.shape[0] * num_groups < torch.get_num_threads()
        and x.numel() >= _MIN_ELEMENTS
        and x.is_contiguous()
        and _row_length(x.numel() // (x.shape[0] * num_groups)) is not None
    )


def forward(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], num_groups: int, eps: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1 / std.

    Shape:
        - x, output: :math:`(N, C, *)`, contiguous float32 for which :func:`pays` is true
        - weight, bias: :math:`(C)`
        - mean, 1 / std: :math:`(N, G)`
    """
    images, channels = x.shape[:2]
    moments = _moments(x.view(images * num_groups, -1))
    if moments is None:
        return torch.native_group_norm(x, weight, bias, images, channels, x[0, 0].numel(), num_groups, eps)
    mean, variance = x.new_tensor(moments)
    per_channel = [m.repeat_interleave(channels // num_groups) for m in (mean, variance)]
    affine = [p if p is None or images == 1 else p.repeat(images) for p in (weight, bias)]
    y = F.batch_norm(x.view(1, images * channels, -1), *per_channel, *affine, eps=eps).view(x.shape)
    return y, mean.view(images, num_groups), (variance + eps).rsqrt().view(images, num_groups)


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Optional[Tensor], num_groups: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own gradients of x, weight and bias."""
    positions = x[0, 0].numel()
    return torch.ops.aten.native_group_norm_backward(
        dy, x, mean, rstd, weight, *x.shape[:2], positions, num_groups, [True, True, True]
    )


def _moments(groups: Tensor) -> Optional[Tuple[List[float], List[float]]]:
    """Mean and variance of each row of a matrix; None where the mean is too large for this method."""
    rows = groups.view(len(groups), -1, _row_length(groups.shape[1]))
    sums = rows.sum(2).sum(1, dtype=torch.float64)
    squares = torch.linalg.vector_norm(rows, dim=2).double().square_().sum(1)
    mean = [value / groups.shape[1] for value in sums.tolist()]
    variance = [value / groups.shape[1] - m * m for value, m in zip(squares.tolist(), mean)]
    if not all(m * m <= _MAX_SQUARED_MEAN * v for m, v in zip(mean, variance)):  # NaN too
        return None
    return mean, variance


@lru_cache(maxsize=None)
def _row_length(elements: int) -> Optional[int]:
    """The largest divisor of ``elements`` up to 2048, if it is long enough for a vector loop to be fast."""
    length = next(d for d in range(min(elements, _MAX_ROW), 0, -1) if elements % d == 0)
    return length if length >= 256 else None
