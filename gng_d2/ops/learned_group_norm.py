"""Group norm whose mean and variance are mixtures over groups of several sizes.

Mean and variance of a group follow from those of its channels, so the data are read and written as in instance norm.
"""

from functools import cache
from typing import Optional

import torch
from torch import Tensor

from gng_d2.errors import InputError

from . import cpu_kernels, group_norm_cpu
from .backends import HAS_OPS, is_compiling, is_ordinary, is_plain, kernels_may_run
from .checks import check_memory, fault_of, memory_format, refuse

_MOST_CHANNELS = 2**13  # the kernels hold what an image's channels have on the stack of a thread


def group_sizes(num_channels: int) -> list[int]:
    """The channels in a group: each power of two that divides ``num_channels``, and ``num_channels`` itself.

    Examples::
        >>> group_sizes(24)
        [1, 2, 4, 8, 24]
    """
    sizes = [1]
    while sizes[-1] * 2 < num_channels and num_channels % (sizes[-1] * 2) == 0:
        sizes.append(sizes[-1] * 2)
    if num_channels > 1:
        sizes.append(num_channels)
    return sizes


def learned_group_norm(
    input: Tensor,
    mixtures: Tensor,
    weight: Optional[Tensor] = None,  # noqa: UP045 TorchScript of PyTorch 2.0 knows no Tensor | None
    bias: Optional[Tensor] = None,  # noqa: UP045
    eps: float = 1e-5,
) -> Tensor:
    r"""Group norm over groups of all sizes at once.

    .. math:: y = \frac{x - \sum_k a_k M_k}{\sqrt{\sum_k b_k V_k + \epsilon}} * \gamma + \beta

    where :math:`M_k` and :math:`V_k` are mean and variance over groups of k channels of an image, as in group norm, and
    a and b are the two mixtures. Statistics are computed in float32 at least, and the output has the input's type. On a
    CPU our kernels compute it, which pass over the data as often as those of instance norm.

    Args:
        mixtures: of the mean and of the variance, each with one weight for each of :func:`group_sizes` of C. The
            weights of a mixture have to add up to 1.
        input, weight, bias, eps: as in :func:`torch.nn.functional.group_norm`.

    Shape:
        - input, output: :math:`(N, C, *)`
        - mixtures: :math:`(2, K)`
        - weight, bias: :math:`(C)`

    Raises:
        InputError: the mixtures have another shape.

    Examples::
        >>> x, sizes = torch.randn(2, 6, 8, 8), group_sizes(6)
        >>> y = learned_group_norm(x, torch.tensor([[0.0, 1.0, 0.0]] * 2))
        >>> sizes, torch.allclose(y, torch.nn.functional.group_norm(x, 3), atol=1e-6)
        ([1, 2, 6], True)
    """
    if not torch.jit.is_scripting():
        if _kernels_take(input, mixtures, weight, bias):
            y = _LearnedGroupNorm.apply(input.contiguous(), mixtures, weight, bias, eps)
            return y.contiguous(memory_format=memory_format(input))
    return _in_plain_ops(input, mixtures, weight, bias, eps)


def _in_plain_ops(
    x: Tensor,
    mixtures: Tensor,
    weight: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    eps: float,
) -> Tensor:
    channels = x.shape[1]
    sizes = group_sizes(channels)
    if list(mixtures.shape) != [2, len(sizes)]:
        raise InputError(f"mixtures has shape {list(mixtures.shape)}; {channels} channels need (2, {len(sizes)})")
    wide = x if x.dtype == torch.float64 else x.float()
    # no flattening: ONNX cannot infer a size from an input without images
    variance, mean = torch.var_mean(wide.unsqueeze(-1), list(range(2, x.dim() + 1)), correction=0)
    mixed_mean, mixed_variance = torch.zeros_like(mean), torch.zeros_like(mean)
    for i, size in enumerate(sizes):
        of_channels = mean.unflatten(1, (channels // size, size))
        within = variance.unflatten(1, (channels // size, size))
        of_group = of_channels.mean(2, keepdim=True)
        of_variance = (within + (of_channels - of_group).square()).mean(2, keepdim=True)
        mixed_mean = mixed_mean + mixtures[0, i] * of_group.expand_as(within).reshape(mean.shape)
        mixed_variance = mixed_variance + mixtures[1, i] * of_variance.expand_as(within).reshape(mean.shape)
    scale = torch.rsqrt(mixed_variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mixed_mean * scale
    if bias is not None:
        shift = shift + bias
    for _ in range(x.dim() - 2):
        scale, shift = scale.unsqueeze(-1), shift.unsqueeze(-1)
    return (wide * scale + shift).to(x.dtype)


def _kernels_take(x, mixtures, weight, bias):
    """Whether the kernels take these. In all other cases PyTorch's ops do the work."""
    if not (kernels_may_run() and cpu_kernels.is_compiled() and isinstance(x, Tensor)) or is_compiling():
        return False
    tensors = [t for t in (x, mixtures, weight, bias) if t is not None]
    return (
        is_ordinary(*tensors)
        and all(t.device.type == "cpu" and not t.is_neg() and t.numel() for t in tensors)
        and x.dtype in group_norm_cpu.DTYPES
        and x.dim() > 2
        and x.shape[1] <= _MOST_CHANNELS
        and mixtures.shape == (2, len(group_sizes(x.shape[1])))
        and all(t.shape == x.shape[1:2] and t.dtype in (x.dtype, torch.float32) for t in tensors[2:])
    )


class _LearnedGroupNorm(torch.autograd.Function):
    """The statistics of each channel and the output are those of instance norm's ops, which recompute_norms knows."""

    @staticmethod
    def forward(ctx, x, mixtures, weight, bias, eps):
        channels = x.shape[1]
        check_memory(mixtures)
        if is_plain(x, weight, bias):  # the dispatcher takes a tenth of the time
            statistics, apply = group_norm_cpu.statistics, group_norm_cpu.apply
        else:
            ops = torch.ops.gng_d2
            statistics, apply = ops.group_norm_statistics.default, ops.group_norm_apply.default
        moments = statistics(x, channels, eps)
        mixed = _mixed(*moments, mixtures)
        ctx.save_for_backward(x, mixtures, weight, *moments, *mixed)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        return apply(x, *mixed, weight, bias, channels)

    @staticmethod
    def backward(ctx, dy):
        x, mixtures, weight, *moments = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients that can be differentiated again
            bias = None
            if ctx.bias_dtype is not None:  # it may have changed, and no gradient depends on it
                bias = x.new_zeros(x.shape[1], dtype=ctx.bias_dtype).requires_grad_()
            y = _in_plain_ops(x, mixtures, weight, bias, ctx.eps)
            needed = [t for t, is_needed in zip((x, mixtures, weight, bias), ctx.needs_input_grad) if is_needed]
            found = iter(torch.autograd.grad(y, needed, dy, create_graph=True))
            return *(next(found) if is_needed else None for is_needed in ctx.needs_input_grad[:4]), None
        gradients = torch.ops.gng_d2.learned_group_norm_backward.default(dy, x, mixtures, weight, *moments)
        dtypes = x.dtype, mixtures.dtype, None if weight is None else weight.dtype, ctx.bias_dtype
        return *(None if dtype is None else g.to(dtype) for g, dtype in zip(gradients, dtypes)), None


def _mixed(mean, rstd, mixtures):
    """Mean and 1 / std of each channel of each image, (N, C), from those of the channel alone."""
    mixed, sizes = (torch.empty_like(mean), torch.empty_like(rstd)), _sizes(mean.shape[1])
    tensors = mean, rstd, group_norm_cpu.in_float32(mixtures), sizes, *mixed
    cpu_kernels.call("mix_moments", tensors, *mean.shape, len(sizes))
    return mixed


def _backward(dy, x, mixtures, weight, mean, rstd, mixed_mean, mixed_rstd):
    """The op: the gradients of x, mixtures, weight and bias, after checking all that the kernels rely on."""
    (images, channels), sizes = x.shape[:2], _sizes(x.shape[1])
    moments = {"mean": mean, "rstd": rstd, "mixed_mean": mixed_mean, "mixed_rstd": mixed_rstd}
    faults = [
        fault_of("the input", x, x.shape, x.device, group_norm_cpu.DTYPES),
        fault_of("dy", dy, x.shape, x.device, [x.dtype]),
        fault_of("mixtures", mixtures, (2, len(sizes)), x.device),
        None if weight is None else fault_of("weight", weight, (channels,), x.device),
        *(fault_of(name, t, (images, channels), x.device, [torch.float32]) for name, t in moments.items()),
    ]
    refuse(next((fault for fault in faults if fault is not None), None))
    check_memory(dy, x, mixtures, weight, *moments.values())
    dy, x, mean, rstd, *mixed = (t.contiguous() for t in (dy, x, *moments.values()))
    mixtures, weight = group_norm_cpu.in_float32(mixtures), group_norm_cpu.in_float32(weight)
    sums, factors = (x.new_empty((images, channels, 2), dtype=torch.float64) for _ in range(2))
    dmixtures, dx = mixtures.new_empty((images, 2, len(sizes))), torch.empty_like(x)
    positions = x.numel() // (images * channels)
    of_rows = positions, group_norm_cpu.PIECE, group_norm_cpu.DTYPES.index(x.dtype)
    cpu_kernels.call("row_sums", (dy, x, *mixed, sums), images * channels, *of_rows)
    of_mixtures = sums, mean, rstd, *mixed, weight, mixtures, sizes, factors, dmixtures
    cpu_kernels.call("mix_moments_backward", of_mixtures, images, channels, positions, len(sizes))
    cpu_kernels.call("row_gradients", (dy, x, *mixed, weight, factors, dx), images, channels, *of_rows)
    return dx, dmixtures.sum(0), sums[..., 1].sum(0), sums[..., 0].sum(0)


@cache
def _sizes(num_channels):
    return torch.tensor(group_sizes(num_channels), device="cpu")


if HAS_OPS:
    torch.library.define(
        "gng_d2::learned_group_norm_backward",
        "(Tensor dy, Tensor x, Tensor mixtures, Tensor? weight, Tensor mean, Tensor rstd, Tensor mixed_mean,"
        " Tensor mixed_rstd) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    torch.library.impl("gng_d2::learned_group_norm_backward", "cpu")(_backward)
