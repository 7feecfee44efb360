"""Group norm on a CPU with fewer groups than threads.

PyTorch's own gives each (image, group) to one thread. Here the threads share a group: sums and norms of short
rows, merged in float64, then PyTorch's batch norm in evaluation mode as the affine map of each channel.
"""

import math
from functools import lru_cache
from typing import List, Optional, Tuple

import torch
from torch import Tensor

__all__ = ["pays", "forward", "backward"]

# from tools/benchmark_norm.py: below, what Python adds is more than what a second thread takes away
_MIN_ELEMENTS = 2**20
_MAX_SQUARED_MEAN = 4.0  # of a variance
_MAX_ROW = 2048  # terms that are summed in float32
_BLOCK = 2**22  # elements that a cache holds


def pays(x: Tensor, num_groups: int) -> bool:
    """Whether :func:`forward` takes ``x`` and, from measurements with 2 threads, is faster than PyTorch's own op."""
    elements = x.numel()
    return (
        isinstance(elements, int)  # not a symbol of a tracer
        and elements >= _MIN_ELEMENTS
        and x.dim() >= 2
        and 0 < x.shape[0] * num_groups < torch.get_num_threads()
        and x.dtype == torch.float32
        and x.is_contiguous()
        and _row_length(elements // (x.shape[0] * num_groups)) is not None
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
    mean, variance = _moments(x.view(images * num_groups, -1))
    # Sums of squares lose the variance of features with a large mean. NaN goes the same way.
    if not all(m * m <= _MAX_SQUARED_MEAN * v and v + eps > 0 for m, v in zip(mean, variance)):
        return torch.native_group_norm(x, weight, bias, images, channels, x[0, 0].numel(), num_groups, eps)
    per_channel = x.new_tensor((mean, variance)).repeat_interleave(channels // num_groups, 1)
    weight, bias = (p if p is None or images == 1 else p.repeat(images) for p in (weight, bias))
    folded = x.view(1, images * channels, -1)
    y = torch.native_batch_norm(folded, weight, bias, per_channel[0], per_channel[1], False, 0.0, eps)[0]
    y = torch.ops.aten._unsafe_view(y, x.shape)  # autograd refuses to change a view in place, and a ReLU may follow
    rstd = [1 / math.sqrt(v + eps) for v in variance]
    return y, *(x.new_tensor(values).view(images, num_groups) for values in (mean, rstd))


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Optional[Tensor], num_groups: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own gradients of x, weight and bias."""
    positions = x[0, 0].numel()
    return torch.ops.aten.native_group_norm_backward(
        dy.contiguous(), x, mean, rstd, weight, *x.shape[:2], positions, num_groups, [True, True, True]
    )


def _moments(groups: Tensor) -> Tuple[List[float], List[float]]:
    """Mean and variance of each row of a matrix."""
    elements = groups.shape[1]
    length = _row_length(elements)
    rows = groups.view(-1, length)
    blocks = rows.split(_BLOCK // length)  # the second reading of a block finds it in the cache
    partial = [(block.sum(1), torch.linalg.vector_norm(block, dim=1)) for block in blocks]
    sums, norms = (torch.cat(parts).view(len(groups), -1) for parts in zip(*partial))
    mean = [s / elements for s in sums.sum(1, dtype=torch.float64).tolist()]
    norm = torch.linalg.vector_norm(norms, dim=1, dtype=torch.float64).tolist()
    return mean, [n * n / elements - m * m for n, m in zip(norm, mean)]


@lru_cache(maxsize=None)
def _row_length(elements: int) -> Optional[int]:
    """The largest divisor of ``elements`` up to 2048, if it is long enough for a vector loop to be fast."""
    length = next(d for d in range(min(elements, _MAX_ROW), 0, -1) if elements % d == 0)
    return length if length >= 256 else None
