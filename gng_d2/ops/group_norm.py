"""Group norm as fast as the hardware allows for any number of groups."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cpu_kernels, group_norm_cpu
from .backends import HAS_OPS, HAS_TRITON, is_on, is_ordinary, is_plain, kernels_may_run
from .checks import check_memory, fault_of, memory_format, refuse

_BACKENDS = {"cpu": group_norm_cpu}
if HAS_TRITON:
    from . import group_norm_triton

    _BACKENDS["cuda"] = group_norm_triton

__all__ = ["group_norm"]


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
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
        backend = _backend(input, num_groups, weight, bias, eps)
        if backend is not None:
            if not input.is_contiguous():  # copied here, its copy is what the backward pass keeps
                input = input.contiguous(memory_format=memory_format(input))
            if torch.is_grad_enabled():
                return _GroupNorm.apply(input, weight, bias, num_groups, eps)
            if is_plain(input, weight, bias):  # the dispatcher takes a tenth of the time
                return _forward(backend, input, weight, bias, num_groups, eps)[0]
            return torch.ops.gng_d2.group_norm.default(input, weight, bias, num_groups, eps)[0]
    return F.group_norm(input, num_groups, weight, bias, eps)


def _backend(input, num_groups, weight, bias, eps):
    """The backend that takes these, None for PyTorch's op.

    That op also has the rules, and the errors, for whatever is no plain tensor, int or float. ``is_faster`` is asked
    first because it turns small inputs away in the least time.
    """
    if type(num_groups) is int and num_groups > 0 and type(eps) is float and isinstance(input, Tensor):
        backend = _BACKENDS.get(input.device.type) if kernels_may_run() else None
        if backend is not None and backend.is_faster(input, num_groups, weight, bias):
            if _fits(input, num_groups, weight, bias, backend.DTYPES) and is_on(backend, input.device):
                return backend
    return None


def _fits(x, num_groups, weight, bias, dtypes):
    """Whether the kernels take these, and PyTorch's op takes them too."""
    if not is_ordinary(x, weight, bias) or _fault(x, num_groups, dtypes, weight=weight, bias=bias):
        return False
    of_affine = {p.dtype for p in (weight, bias) if p is not None}
    return x.numel() > num_groups and (of_affine <= {x.dtype} or of_affine == {torch.float32})


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps):
        y, mean, rstd = torch.ops.gng_d2.group_norm.default(x, weight, bias, num_groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # not the bias, which may change before the backward pass
        ctx.num_groups, ctx.eps = num_groups, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_gradients(dy, x, weight, ctx.bias_dtype, ctx.num_groups, ctx.eps), None, None
        dx, dweight, dbias = torch.ops.gng_d2.group_norm_backward.default(dy, x, mean, rstd, weight, ctx.num_groups)
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None


def _differentiable_gradients(dy, x, weight, bias_dtype, num_groups, eps):
    """Gradients that can be differentiated again: those of PyTorch's op."""
    # no gradient depends on the bias
    bias = None if bias_dtype is None else x.new_zeros(x.shape[1], dtype=bias_dtype).requires_grad_()
    parameter_dtype = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)
    y = F.group_norm(x.to(parameter_dtype), num_groups, weight, bias, eps).to(x.dtype)
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    gradients = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy, create_graph=True)))
    return [gradients.get(id(t)) for t in (x, weight, bias)]


def _fault(x, num_groups, dtypes=None, **others):
    """What is wrong with the tensors of an op, None if nothing is."""
    shape = () if x is None else x.shape
    if len(shape) < 2 or num_groups < 1 or shape[1] % num_groups:
        return f"an input of shape {tuple(shape)} does not divide into {num_groups} groups of channels"
    channels, groups = shape[1:2], (shape[0], num_groups)
    shapes = {"dy": shape, "weight": channels, "bias": channels, "mean": groups, "rstd": groups}
    faults = [fault_of("the input", x, shape, x.device, dtypes)] + [
        fault_of(name, t, shapes[name], x.device, dtypes)
        for name, t in others.items()
        if t is not None or name not in ("weight", "bias")
    ]
    return next((fault for fault in faults if fault is not None), None)


def _forward(backend, x, weight, bias, num_groups, eps):
    """The op: what ``backend`` computes, after checking all that it relies on."""
    refuse(_fault(x, num_groups, backend.DTYPES, weight=weight, bias=bias))
    check_memory(x, weight, bias)
    layout = memory_format(x)
    x = _as_read(backend, x, layout)
    y, mean, rstd = backend.forward(x, _contiguous(weight), _contiguous(bias), num_groups, eps)
    return y.contiguous(memory_format=layout), mean, rstd


def _backward(backend, dy, x, mean, rstd, weight, num_groups):
    refuse(_fault(x, num_groups, backend.DTYPES, dy=dy, mean=mean, rstd=rstd, weight=weight))
    check_memory(dy, x, mean, rstd, weight)
    layout = memory_format(x)  # a hook on saved tensors may have changed it
    dy, x = _as_read(backend, dy, layout), _as_read(backend, x, layout)
    mean, rstd, weight = mean.contiguous(), rstd.contiguous(), _contiguous(weight)
    dx, dweight, dbias = backend.backward(dy, x, mean, rstd, weight, num_groups)
    return dx.contiguous(memory_format=layout), dweight, dbias


def _as_read(backend, t, layout):
    return t.contiguous(memory_format=layout if backend.READS_CHANNELS_LAST else torch.contiguous_format)


def _contiguous(parameter):
    return None if parameter is None else parameter.contiguous()


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
        torch.library.impl("gng_d2::group_norm", "cpu")(partial(_forward, group_norm_cpu))
        torch.library.impl("gng_d2::group_norm_backward", "cpu")(partial(_backward, group_norm_cpu))
    if HAS_TRITON:
        torch.library.impl("gng_d2::group_norm", "cuda")(partial(_forward, group_norm_triton))
        torch.library.impl("gng_d2::group_norm_backward", "cuda")(partial(_backward, group_norm_triton))

    @torch.library.register_fake("gng_d2::group_norm")
    def _(x, weight, bias, num_groups, eps):
        refuse(_fault(x, num_groups, weight=weight, bias=bias))
        mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
        return torch.empty_like(x, memory_format=memory_format(x)), mean, torch.empty_like(mean)

    @torch.library.register_fake("gng_d2::group_norm_backward")
    def _(dy, x, mean, rstd, weight, num_groups):
        refuse(_fault(x, num_groups, dy=dy, mean=mean, rstd=rstd, weight=weight))
        dweight = x.new_empty(x.shape[1], dtype=torch.float32)
        return torch.empty_like(x, memory_format=memory_format(x)), dweight, torch.empty_like(dweight)
