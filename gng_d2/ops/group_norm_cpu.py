"""Group norm on a CPU in which the threads share each group.

PyTorch's own gives each (image, group) to one thread, and leaves others idle.
"""

import math

import torch
from torch import Tensor

from . import cpu_kernels
from .backends import is_compiling

__all__ = ["DTYPES", "READS_CHANNELS_LAST", "backward", "forward", "is_faster", "works"]

DTYPES = (torch.float32,)
READS_CHANNELS_LAST = False

_MIN_ELEMENTS = 3 * 2**16  # for fewer, Python costs more time than a second thread saves
_MIN_POSITIONS = 512  # for fewer, the calls for short rows take the time
# where none of PyTorch's threads idles, ours is faster in the caches
_MIN_SHARE, _MAX_CACHED = 2**18, 2**21
_PIECE = 4096  # elements that the first cache holds
_ACTIVATIONS = (None, "relu", "silu")  # in the order of the C file


def is_faster(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, fused: bool = False
) -> bool:
    """Whether this is faster than PyTorch's ops, as measured with 1 and 2 threads on inputs that are contiguous.

    ``fused``: with an activation or a residual, whose passes over the data it saves.
    """
    if is_compiling():  # the compiler fuses PyTorch's op
        return False
    elements = x.numel()
    if elements < _MIN_ELEMENTS or x.dim() < 3:
        return False
    images, channels = x.shape[:2]
    if elements < _MIN_POSITIONS * images * channels or num_groups > channels or not x.is_contiguous():
        return False
    if fused:
        return True
    groups, threads = images * num_groups, torch.get_num_threads()
    share_of_busy_threads = groups / (math.ceil(groups / threads) * threads)
    return share_of_busy_threads <= 0.75 or threads * _MIN_SHARE <= elements <= _MAX_CACHED


def works(device: torch.device) -> bool:
    """Whether the library was compiled."""
    return cpu_kernels.is_compiled()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the mean and 1 / std, all contiguous and in float32 as the arguments are.

    Shape:
        - x, residual, output: :math:`(N, C, *)`
        - weight, bias: :math:`(C)`
        - mean, 1 / std: :math:`(N, G)`
    """
    images, channels = x.shape[:2]
    size = x.numel() // (images * num_groups)
    y = torch.empty_like(x)
    mean = x.new_empty((images, num_groups))
    rstd = torch.empty_like(mean)
    moments = x.new_empty((images * num_groups * math.ceil(size / _PIECE), 2), dtype=torch.float64)
    sizes = images, channels, size * num_groups // channels, num_groups, _PIECE, _ACTIVATIONS.index(activation)
    cpu_kernels.call("group_norm_activation", (x, weight, bias, residual, y, mean, rstd, moments), *sizes, eps)
    return y, mean, rstd


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
    """The gradients of x, weight and bias, and with ``kept`` that of the residual.

    Shape:
        - dy, kept: that of x. ``kept`` is what an activation after a residual needs: the output for relu, else the
          residual
        - others: as :func:`forward` takes and returns them
    """
    images, channels = x.shape[:2]
    dx = torch.empty_like(x)
    dresidual = None if kept is None else torch.empty_like(x)
    dweight, dbias = x.new_empty(channels), x.new_empty(channels)
    sums = x.new_empty((images * (channels + num_groups), 2), dtype=torch.float64)
    sizes = images, channels, x.numel() // (images * channels), num_groups, _PIECE, _ACTIVATIONS.index(activation)
    tensors = dy, x, mean, rstd, weight, bias, kept, dx, dweight, dbias, dresidual, sums
    cpu_kernels.call("group_norm_activation_backward", tensors, *sizes)
    return dx, dweight, dbias, dresidual
