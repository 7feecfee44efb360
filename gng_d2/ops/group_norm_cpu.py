"""Group norm on a CPU in which the threads share each group.

PyTorch's own gives each (image, group) to one thread, and leaves others idle.
"""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor

from . import cpu_kernels

__all__ = ["pays", "forward", "backward"]

_MIN_ELEMENTS = 3 * 2**16  # below, what Python adds is more than what a second thread takes away
_MIN_POSITIONS = 512  # below, the time goes into calls for short rows
# where none of PyTorch's threads idles, ours is faster in the caches
_MIN_SHARE, _MAX_CACHED = 2**18, 2**21
_PIECE = 4096  # elements that the first cache holds


def pays(x: Tensor, num_groups: int, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None) -> bool:
    """Whether :func:`forward` takes these and, as measured with 1 and 2 threads, is faster than PyTorch's own op."""
    elements = x.numel()
    if not (
        type(x) is Tensor  # a subclass may have no memory
        and elements >= _MIN_ELEMENTS
        and x.dim() > 2
        and num_groups > 0
        and x.dtype == torch.float32
        and x.is_contiguous()
        and cpu_kernels.is_compiled()
    ):
        return False
    images, channels = x.shape[:2]
    if elements < _MIN_POSITIONS * images * channels or channels % num_groups:
        return False
    for p in (weight, bias):
        if p is not None and not (
            p.shape == (channels,) and p.is_cpu and p.dtype == torch.float32 and p.is_contiguous()
        ):
            return False
    groups, threads = images * num_groups, torch.get_num_threads()
    share_of_busy_threads = groups / (math.ceil(groups / threads) * threads)
    return share_of_busy_threads <= 0.75 or threads * _MIN_SHARE <= elements <= _MAX_CACHED


def forward(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], num_groups: int, eps: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1 / std.

    Shape:
        - x, output: :math:`(N, C, *)`, float32; the output is contiguous
        - weight, bias: :math:`(C)`, contiguous float32
        - mean, 1 / std: :math:`(N, G)`
    """
    x = x.contiguous()  # a graph may be run on another layout than it was traced with
    images, channels = x.shape[:2]
    size = x.numel() // (images * num_groups)
    y = torch.empty_like(x)
    mean = x.new_empty((images, num_groups))
    rstd = torch.empty_like(mean)
    moments = x.new_empty(images * num_groups * math.ceil(size / _PIECE), dtype=torch.complex128)
    sizes = images, channels, size * num_groups // channels, num_groups, _PIECE
    cpu_kernels.call("group_norm", x, weight, bias, y, mean, rstd, moments, *sizes, eps)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Optional[Tensor], num_groups: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    images, channels = x.shape[:2]
    dy, x = dy.contiguous(), x.contiguous()  # a hook on saved tensors may have changed their layout
    dx = torch.empty_like(x)
    dweight, dbias = x.new_empty(channels), x.new_empty(channels)
    sums = x.new_empty(images * (channels + num_groups), dtype=torch.complex128)
    sizes = images, channels, x.numel() // (images * channels), num_groups, _PIECE
    cpu_kernels.call("group_norm_backward", dy, x, mean, rstd, weight, dx, dweight, dbias, sums, *sizes)
    return dx, dweight, dbias
