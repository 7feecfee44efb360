"""Group norm as fast as the hardware allows for any number of groups."""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cpu_kernels, group_norm_cpu
from .backends import HAS_OPS, HAS_TRITON, TRITON_TYPES, is_plain, is_transformed, triton_works

if HAS_TRITON:
    from . import group_norm_triton

__all__ = ["group_norm"]

# A group of fewer elements is read by one thread block in about the time that our additional launches take.
_MIN_GROUP = 2**15


def group_norm(
    input: Tensor, num_groups: int, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None, eps: float = 1e-5
) -> Tensor:
    """:func:`torch.nn.functional.group_norm` with no hardware left idle where ``num_groups`` is small.

    PyTorch's op gives each (image, group) to one thread block of a GPU or one thread of a CPU. Where ours is the
    faster one it is used (:mod:`.group_norm_triton`, :mod:`.group_norm_cpu`), elsewhere PyTorch's.

    On CUDA a float16 or bfloat16 input with float32 parameters, as under autocast, keeps its type and is normalized
    in float32 inside; PyTorch would copy it to float32.

    Shape:
        - input: :math:`(N, C, *)`
        - weight, bias: :math:`(C)`
        - Output: as the input

    Examples::
        >>> group_norm(torch.randn(2, 6, 8, 8), num_groups=1).shape
        torch.Size([2, 6, 8, 8])
    """
    if not torch.jit.is_scripting():
        if HAS_OPS and _is_for_us(input, num_groups, weight, bias):
            if not input.is_contiguous():  # on CUDA alone
                input = input.contiguous(memory_format=group_norm_triton.memory_format(input))
            if torch.is_grad_enabled():
                return _GroupNorm.apply(input, weight, bias, num_groups, eps)
            if input.is_cpu and is_plain(input, weight, bias):  # the dispatcher takes a tenth of a small input's time
                return group_norm_cpu.forward(input, weight, bias, num_groups, eps)[0]
            return torch.ops.gng_d2.group_norm.default(input, weight, bias, num_groups, eps)[0]
    return F.group_norm(input, num_groups, weight, bias, eps)


def _is_for_us(input, num_groups, weight, bias):
    """Whether ours takes what it is given, and is the faster one."""
    if is_transformed():
        return False
    if input.is_cpu:
        return not torch.compiler.is_compiling() and group_norm_cpu.pays(input, num_groups, weight, bias)
    if input.dim() < 2 or not input.numel() or num_groups < 1 or input.shape[1] % num_groups:
        return False
    affine = [p for p in (weight, bias) if p is not None]
    if any(p.shape != input.shape[1:2] or p.device != input.device for p in affine):
        return False
    one_type = all(p.dtype == input.dtype for p in affine)
    if not input.is_cuda or not HAS_TRITON or input.dtype not in TRITON_TYPES:
        return False
    half = input.dtype != torch.float32
    if not one_type and not (half and all(p.dtype == torch.float32 for p in affine)):
        return False
    return _is_faster_on_cuda(
        input, num_groups, keeps_type=half and (not one_type or torch.is_autocast_enabled("cuda"))
    )


def _is_faster_on_cuda(input, num_groups, keeps_type):
    if not (keeps_type or group_norm_triton.memory_format(input) != torch.contiguous_format):
        thread_blocks = input.shape[0] * num_groups
        multiprocessors = torch.cuda.get_device_properties(input.device).multi_processor_count
        if thread_blocks >= multiprocessors or input.numel() < thread_blocks * _MIN_GROUP:
            return False
    return triton_works(input.device.index)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps):
        y, mean, rstd = torch.ops.gng_d2.group_norm.default(x, weight, bias, num_groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # not the bias, which may change before the backward pass
        ctx.num_groups, ctx.eps = num_groups, eps
        ctx.type_of_bias = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_gradients(dy, x, weight, ctx.type_of_bias, ctx.num_groups, ctx.eps), None, None
        dx, dweight, dbias = torch.ops.gng_d2.group_norm_backward.default(dy, x, mean, rstd, weight, ctx.num_groups)
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if ctx.type_of_bias is None else dbias.to(ctx.type_of_bias)
        return dx, dweight, dbias, None, None


def _differentiable_gradients(dy, x, weight, type_of_bias, num_groups, eps):
    """Gradients that can be differentiated again: those of PyTorch's op."""
    # no gradient depends on the bias
    bias = None if type_of_bias is None else x.new_zeros(x.shape[1], dtype=type_of_bias).requires_grad_()
    parameter_type = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)
    y = F.group_norm(x.to(parameter_type), num_groups, weight, bias, eps).to(x.dtype)
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    gradients = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy, create_graph=True)))
    return [gradients.get(id(t)) for t in (x, weight, bias)]


if HAS_OPS:
    torch.library.define(
        "gng_d2::group_norm",
        "(Tensor x, Tensor? weight, Tensor? bias, int num_groups, float eps) -> (Tensor, Tensor, Tensor)",
    )
    torch.library.define(
        "gng_d2::group_norm_backward",
        "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, int num_groups) -> (Tensor, Tensor, Tensor)",
    )
    if cpu_kernels.is_compiled():
        torch.library.impl("gng_d2::group_norm", "cpu")(cpu_kernels.checked(group_norm_cpu.forward))
        torch.library.impl("gng_d2::group_norm_backward", "cpu")(cpu_kernels.checked(group_norm_cpu.backward))
    if HAS_TRITON:
        torch.library.impl("gng_d2::group_norm", "cuda")(group_norm_triton.forward)
        torch.library.impl("gng_d2::group_norm_backward", "cuda")(group_norm_triton.backward)

    @torch.library.register_fake("gng_d2::group_norm")
    def _(x, weight, bias, num_groups, eps):
        mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
        return torch.empty_like(x), mean, torch.empty_like(mean)

    @torch.library.register_fake("gng_d2::group_norm_backward")
    def _(dy, x, mean, rstd, weight, num_groups):
        dweight = x.new_empty(x.shape[1], dtype=torch.float32)
        return torch.empty_like(x), dweight, torch.empty_like(dweight)
