"""Group norm on a CPU in which the threads share each group.

PyTorch's own gives each (image, group) to one thread, and leaves others idle.
"""

import math

import torch
from torch import Tensor, nn

from . import cpu_kernels

__all__ = ["DTYPES", "is_faster", "supports", "forward", "backward"]

DTYPES = (torch.float32,)

_MIN_ELEMENTS = 3 * 2**16  # below, what Python adds is more than what a second thread takes away
_MIN_POSITIONS = 512  # below, the time goes into calls for short rows
# where none of PyTorch's threads idles, ours is faster in the caches
_MIN_SHARE, _MAX_CACHED = 2**18, 2**21
_PIECE = 4096  # elements that the first cache holds


def is_faster(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """Whether this is faster than PyTorch's op, as measured with 1 and 2 threads. Only sizes matter here."""
    if torch.compiler.is_compiling():  # the compiler fuses PyTorch's op
        return False
    elements = x.numel()
    if elements < _MIN_ELEMENTS or x.dim() < 3:
        return False
    images, channels = x.shape[:2]
    if elements < _MIN_POSITIONS * images * channels or num_groups > channels:
        return False
    groups, threads = images * num_groups, torch.get_num_threads()
    share_of_busy_threads = groups / (math.ceil(groups / threads) * threads)
    return share_of_busy_threads <= 0.75 or threads * _MIN_SHARE <= elements <= _MAX_CACHED


def supports(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """Whether these are contiguous float32 tensors on the CPU, of shapes that group norm takes."""
    if not (
        type(x) is Tensor  # a subclass may have no memory
        and x.is_cpu
        and x.dtype in DTYPES
        and x.is_contiguous()
        and x.dim() > 1
        and x.numel() > num_groups  # PyTorch refuses a single number
        and x.shape[1] % num_groups == 0
        and cpu_kernels.is_compiled()
    ):
        return False
    for p in (weight, bias):
        if p is not None and not (
            type(p) in (Tensor, nn.Parameter)
            and p.is_cpu
            and p.dtype in DTYPES
            and p.is_contiguous()
            and p.shape == x.shape[1:2]
        ):
            return False
    return True


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, contiguous whatever the layout of ``x``, the mean and 1 / std.

    Shape:
        - x, output: :math:`(N, C, *)`, float32
        - weight, bias: :math:`(C)`, contiguous float32
        - mean, 1 / std: :math:`(N, G)`
    """
    x = x.contiguous()
    images, channels = x.shape[:2]
    size = x.numel() // (images * num_groups)
    y = torch.empty_like(x)
    mean = x.new_empty((images, num_groups))
    rstd = torch.empty_like(mean)
    moments = x.new_empty((images * num_groups * math.ceil(size / _PIECE), 2), dtype=torch.float64)
    sizes = images, channels, size * num_groups // channels, num_groups, _PIECE
    cpu_kernels.call("group_norm", (x, weight, bias, y, mean, rstd, moments), *sizes, eps)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (contiguous), weight and bias.

    Shape:
        - dy: that of x
        - others: as :func:`forward` takes and returns them
    """
    images, channels = x.shape[:2]
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    dweight, dbias = x.new_empty(channels), x.new_empty(channels)
    sums = x.new_empty((images * (channels + num_groups), 2), dtype=torch.float64)
    sizes = images, channels, x.numel() // (images * channels), num_groups, _PIECE
    cpu_kernels.call("group_norm_backward", (dy, x, mean, rstd, weight, dx, dweight, dbias, sums), *sizes)
    return dx, dweight, dbias
