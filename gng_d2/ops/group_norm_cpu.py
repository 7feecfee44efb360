"""Group norm on a CPU in which the threads share each group.

PyTorch's own gives each (image, group) to one thread, and leaves others idle.
"""

import math

import torch
from torch import Tensor

from . import cpu_kernels
from .backends import is_compiling

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the C file
READS_CHANNELS_LAST = False

_MIN_ELEMENTS = 3 * 2**16  # for fewer, Python costs more time than a second thread saves
_MIN_POSITIONS = 512  # for fewer, the calls for short rows take the time
# where none of PyTorch's threads idles, ours is faster in the caches
_MIN_SHARE, _MAX_CACHED = 2**18, 2**21
_MIN_FUSED = 2**19  # where none idles, fewer elements lie in the caches, and the passes that are saved cost nothing
PIECE = 4096  # elements that the first cache holds
ACTIVATIONS = (None, "relu", "silu")  # in the order of the C file


def is_faster(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, fused: bool = False
) -> bool:
    """Whether this is faster than PyTorch's ops, as measured with 1 and 2 threads on contiguous inputs in float32.

    ``fused``: with an activation or a residual, whose passes over the data it saves in the other types, too.
    """
    if is_compiling():  # the compiler fuses PyTorch's op
        return False
    elements = x.numel()
    if elements < _MIN_ELEMENTS or x.dim() < 3:
        return False
    images, channels = x.shape[:2]
    if elements < _MIN_POSITIONS * images * channels or num_groups > channels or not x.is_contiguous():
        return False
    if not fused and x.dtype != torch.float32:
        return False
    groups, threads = images * num_groups, torch.get_num_threads()
    a_thread_idles = groups / (math.ceil(groups / threads) * threads) <= 0.75
    return a_thread_idles or (elements >= _MIN_FUSED if fused else threads * _MIN_SHARE <= elements <= _MAX_CACHED)


def statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and 1 / std of each group, in float32.

    Shape:
        - x: :math:`(N, C, *)`, contiguous, of one of ``DTYPES``
        - mean, 1 / std: :math:`(N, G)`
    """
    groups = len(x) * num_groups
    size = x.numel() // groups
    mean, rstd = (x.new_empty((len(x), num_groups), dtype=torch.float32) for _ in range(2))
    moments = x.new_empty((groups * math.ceil(size / PIECE), 2), dtype=torch.float64)
    numbers = groups, size, PIECE, DTYPES.index(x.dtype), eps
    cpu_kernels.call("group_norm_statistics", (x, mean, rstd, moments), *numbers)
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
    """The output, with the statistics of :func:`statistics`.

    Shape:
        - x, residual, output: :math:`(N, C, *)`, contiguous, of the same type
        - weight, bias: :math:`(C)`
    """
    y = torch.empty_like(x)
    tensors = x, mean, rstd, in_float32(weight), in_float32(bias), residual, y
    cpu_kernels.call("group_norm_apply", tensors, *_numbers(x, num_groups, activation))
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
    """The gradients of x, of weight and bias in float32, and with ``kept`` that of the residual.

    Shape:
        - dy, kept: that of x. ``kept`` is what an activation after a residual needs: the output for relu, else the
          residual
        - others: as in :func:`apply`
    """
    images, channels = x.shape[:2]
    dx = torch.empty_like(x)
    dresidual = None if kept is None else torch.empty_like(x)
    dweight, dbias = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    sums, factors = (x.new_empty((images * rows, 2), dtype=torch.float64) for rows in (channels, num_groups))
    of_forward = dy, x, mean, rstd, in_float32(weight), in_float32(bias), kept
    tensors = *of_forward, dx, dweight, dbias, dresidual, sums, factors
    cpu_kernels.call("group_norm_gradients", tensors, *_numbers(x, num_groups, activation))
    return dx, dweight, dbias, dresidual


def in_float32(parameter):
    return None if parameter is None else parameter.float().contiguous()


def _numbers(x, num_groups, activation):
    images, channels = x.shape[:2]
    positions = x.numel() // (images * channels)
    return images, channels, positions, num_groups, PIECE, DTYPES.index(x.dtype), ACTIVATIONS.index(activation)
