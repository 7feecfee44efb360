"""Group norm, with what follows it, as fast as the hardware allows for any number of groups."""

from collections.abc import Callable
from functools import partial
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from gng_d2.errors import InputError

from . import cpu_kernels, group_norm_cpu
from .backends import HAS_OPS, HAS_TRITON, is_compiling, is_on, is_ordinary, is_plain, is_transformed, kernels_may_run
from .checks import check_memory, fault_of, memory_format, refuse

# by the type of a device: a module with the functions statistics, apply and backward for contiguous tensors, or for
# channels-last ones too (READS_CHANNELS_LAST), of one of its DTYPES; and is_faster, whether they are
_BACKENDS = {"cpu": group_norm_cpu} if cpu_kernels.is_compiled() else {}
if HAS_TRITON:
    from . import group_norm_triton

    _BACKENDS["cuda"] = group_norm_triton


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,  # noqa: UP045 TorchScript of PyTorch 2.0 knows no Tensor | None
    bias: Optional[Tensor] = None,  # noqa: UP045
    eps: float = 1e-5,
    activation: Optional[str] = None,  # noqa: UP045
    residual: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """:func:`torch.nn.functional.group_norm` and what follows it, with no hardware left idle.

    PyTorch's op gives each (image, group) to one thread block of a GPU or one thread of a CPU, and an addition and an
    activation after it read and write the data again. Where a kernel of ours is faster it is used
    (:mod:`.group_norm_triton`, :mod:`.group_norm_cpu`), elsewhere PyTorch's ops.

    On CUDA a float16 or bfloat16 input with float32 parameters, as under autocast, keeps its type and is normalized
    in float32 inside; PyTorch would copy it to float32.

    Args:
        input, num_groups, weight, bias, eps: as in :func:`torch.nn.functional.group_norm`.
        activation: ``"relu"``, ``"silu"``, or None.
        residual: is added before the activation.

    Shape:
        - input: :math:`(N, C, *)`
        - weight, bias: :math:`(C)`
        - residual, output: as the input

    Raises:
        InputError: the activation is another one.

    Examples::
        >>> x = torch.randn(2, 6, 8, 8)
        >>> group_norm(x, num_groups=1).shape
        torch.Size([2, 6, 8, 8])
        >>> y = group_norm(x, num_groups=1, activation="relu", residual=x)
        >>> torch.allclose(y, torch.relu(group_norm(x, num_groups=1) + x), atol=1e-6)
        True
    """
    if not torch.jit.is_scripting():
        y = _by_kernels(input, num_groups, weight, bias, eps, activation, residual)
        if y is not None:
            return y
        if activation is not None or residual is not None:  # the norm alone may have a kernel
            y = group_norm(input, num_groups, weight, bias, eps)
            is_traced = not isinstance(y, Tensor) or is_compiling() or is_transformed()
            return _activate(y, activation, residual, inplace=not is_traced)
    return _activate(F.group_norm(input, num_groups, weight, bias, eps), activation, residual)


def _activate(
    y: Tensor,
    activation: Optional[str],  # noqa: UP045
    residual: Optional[Tensor],  # noqa: UP045
    inplace: bool = False,
) -> Tensor:
    """What follows the norm, in PyTorch's ops. ``inplace``: ``y`` may be changed, as models do that have these ops."""
    if residual is not None:
        if inplace and residual.shape == y.shape:
            y += residual
        else:
            y = (y + residual).to(y.dtype)  # as in place: under autocast the shortcut may be float32
    if activation is None:
        return y
    if activation == "relu":
        return F.relu(y, inplace=inplace)
    if activation == "silu":
        return F.silu(y)
    raise InputError(f"activation is {activation}: set it to 'relu', 'silu' or None")


def _by_kernels(input, num_groups, weight, bias, eps, activation, residual):
    """The output, None where PyTorch's ops are to compute it."""
    backend = _backend(input, num_groups, weight, bias, eps, activation, residual)
    if backend is None:
        return None
    if not input.is_contiguous():  # copied before the op, so that the backward pass keeps the copy
        input = input.contiguous(memory_format=memory_format(input))
    arguments = input, weight, bias, num_groups, eps, activation, residual
    if torch.is_grad_enabled():
        return _GroupNorm.apply(*arguments)
    if is_plain(input, weight, bias, residual):  # the dispatcher takes a tenth of the time
        moments = _statistics(backend, input, num_groups, eps)
        return _apply(backend, input, *moments, weight, bias, num_groups, activation, residual)
    return _forward(*arguments)[0]


def _backend(input, num_groups, weight, bias, eps, activation=None, residual=None):
    """The backend that computes these arguments. None: PyTorch's ops do.

    PyTorch's ops also decide what to do with anything but plain tensors, ints and floats, and raise their own errors.
    ``is_faster`` is asked first because it turns small inputs away in the least time.
    """
    fused = activation is not None or residual is not None
    if type(num_groups) is int and num_groups > 0 and type(eps) is float and isinstance(input, Tensor):
        if not kernels_may_run() or (fused and is_compiling()):  # the compiler fuses PyTorch's ops
            return None
        backend = _BACKENDS.get(input.device.type)
        if backend is not None and backend.is_faster(input, num_groups, weight, bias, fused):
            if _fits(backend, input, num_groups, weight, bias, activation, residual) and is_on(input.device):
                return backend
    return None


def _fits(backend, x, num_groups, weight, bias, activation, residual):
    """Whether the kernels take these, and return what PyTorch's ops do."""
    if not is_ordinary(x, weight, bias, residual):
        return False
    if _fault(x, num_groups, backend.DTYPES, activation, weight=weight, bias=bias, residual=residual):
        return False
    of_affine = {p.dtype for p in (weight, bias) if p is not None}
    return x.numel() > num_groups and (of_affine <= {x.dtype} or of_affine == {torch.float32})


def _forward(x, weight, bias, num_groups, eps, activation, residual):
    """Output, mean and 1 / std, by two ops: recompute_norms keeps what the first returns and runs the second again."""
    mean, rstd = torch.ops.gng_d2.group_norm_statistics.default(x, num_groups, eps)
    y = torch.ops.gng_d2.group_norm_apply.default(x, mean, rstd, weight, bias, num_groups, activation, residual)
    return y, mean, rstd


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, activation, residual):
        y, mean, rstd = _forward(x, weight, bias, num_groups, eps, activation, residual)
        # What the activation's slope is computed from. For relu that is the output, which the next layer keeps too.
        kept = None if activation is None or residual is None else y if activation == "relu" else residual
        # A bias that is not needed may change before the backward pass.
        bias_is_needed = activation == "silu" or (activation == "relu" and residual is None)
        ctx.save_for_backward(x, weight, bias if bias_is_needed else None, mean, rstd, kept)
        ctx.num_groups, ctx.eps, ctx.activation = num_groups, eps, activation
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            dx, dweight, dbias, dresidual = _differentiable_gradients(ctx, dy)
        else:
            x, weight, bias, mean, rstd, kept = ctx.saved_tensors
            dx, dweight, dbias, dresidual = torch.ops.gng_d2.group_norm_backward.default(
                dy, x, mean, rstd, weight, ctx.num_groups, ctx.activation, bias, kept
            )
            dweight = None if weight is None else dweight.to(weight.dtype)
            dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
            if ctx.activation is None:
                dresidual = dy
        return dx, dweight, dbias, None, None, None, dresidual if ctx.has_residual else None


def _differentiable_gradients(ctx, dy):
    """Gradients that can be differentiated again: those of PyTorch's ops."""
    x, weight, bias, _, _, kept = ctx.saved_tensors
    if bias is None and ctx.bias_dtype is not None:  # no gradient depends on it
        bias = x.new_zeros(x.shape[1], dtype=ctx.bias_dtype).requires_grad_()
    parameter_dtype = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)
    y = F.group_norm(x.to(parameter_dtype), ctx.num_groups, weight, bias, ctx.eps).to(x.dtype)
    if ctx.activation == "relu":
        dy = torch.where((y if kept is None else kept) <= 0, 0, dy)
    elif ctx.activation == "silu":
        t = y if kept is None else y + kept
        dy = dy * (t.sigmoid() * (1 + t * (1 - t.sigmoid())))
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    gradients = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ()))
    return *(gradients.get(id(t)) for t in (x, weight, bias)), dy


def _fault(x, num_groups, dtypes=None, activation=None, **others):
    """What is wrong with the arguments of an op, None if nothing is."""
    shape = () if x is None else x.shape
    if len(shape) < 2 or num_groups < 1 or shape[1] % num_groups:
        return f"an input of shape {tuple(shape)} does not divide into {num_groups} groups of channels"
    if activation not in group_norm_cpu.ACTIVATIONS:
        return f"{activation!r} is none of the activations {group_norm_cpu.ACTIVATIONS}"
    of_channels, of_groups = (shape[1:2], dtypes), ((shape[0], num_groups), dtypes and (torch.float32,))
    needs = {"weight": of_channels, "bias": of_channels, "mean": of_groups, "rstd": of_groups}
    faults = [fault_of("the input", x, shape, x.device, dtypes)]
    for name, t in others.items():
        if t is not None or name not in ("weight", "bias", "residual", "kept"):
            shape_of_it, its_dtypes = needs.get(name, (shape, dtypes and (x.dtype,)))
            faults.append(fault_of(name, t, shape_of_it, x.device, its_dtypes))
    return next((fault for fault in faults if fault is not None), None)


def _statistics(backend, x, num_groups, eps):
    """The op: what ``backend`` computes, after checking all that it relies on."""
    refuse(_fault(x, num_groups, backend.DTYPES))
    check_memory(x)
    return backend.statistics(*_as_read(backend, x), num_groups, eps)


def _apply(backend, x, mean, rstd, weight, bias, num_groups, activation=None, residual=None):
    tensors = {"mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "residual": residual}
    refuse(_fault(x, num_groups, backend.DTYPES, activation, **tensors))
    check_memory(x, *tensors.values())
    layout = memory_format(x)
    x, residual = _as_read(backend, x, residual)
    y = backend.apply(x, *_contiguous(mean, rstd, weight, bias), num_groups, activation, residual)
    return y.contiguous(memory_format=layout)


def _backward(backend, dy, x, mean, rstd, weight, num_groups, activation=None, bias=None, kept=None):
    tensors = {"dy": dy, "mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "kept": kept}
    refuse(_fault(x, num_groups, backend.DTYPES, activation, **tensors))
    check_memory(x, *tensors.values())
    layout = memory_format(x)  # a hook on saved tensors may have changed it
    x, dy, kept = _as_read(backend, x, dy, kept)
    mean, rstd, weight, bias = _contiguous(mean, rstd, weight, bias)
    dx, dweight, dbias, dresidual = backend.backward(dy, x, mean, rstd, weight, num_groups, activation, bias, kept)
    dresidual = x.new_empty(0) if dresidual is None else dresidual.contiguous(memory_format=layout)
    return dx.contiguous(memory_format=layout), dweight, dbias, dresidual


def _as_read(backend, x, *others):
    """The tensors in the layout of ``x``, or contiguous if ``backend`` reads no other."""
    return _contiguous(x, *others, layout=memory_format(x) if backend.READS_CHANNELS_LAST else torch.contiguous_format)


def _contiguous(*tensors, layout=torch.contiguous_format):
    return [None if t is None else t.contiguous(memory_format=layout) for t in tensors]


if HAS_OPS:
    _OPS: dict[str, tuple[Callable, str]] = {
        "group_norm_statistics": (_statistics, "(Tensor x, int num_groups, float eps) -> (Tensor, Tensor)"),
        "group_norm_apply": (
            _apply,
            "(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int num_groups, str? activation=None,"
            " Tensor? residual=None) -> Tensor",
        ),
        "group_norm_backward": (
            _backward,
            "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, int num_groups, str? activation=None,"
            " Tensor? bias=None, Tensor? kept=None) -> (Tensor, Tensor, Tensor, Tensor)",
        ),
    }
    for _name, (_function, _schema) in _OPS.items():
        torch.library.define(f"gng_d2::{_name}", _schema)
        for _device, _backend_of_it in _BACKENDS.items():
            torch.library.impl(f"gng_d2::{_name}", _device)(partial(_function, _backend_of_it))

    @torch.library.register_fake("gng_d2::group_norm_statistics")
    def _(x, num_groups, eps):
        refuse(_fault(x, num_groups))
        mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
        return mean, torch.empty_like(mean)

    @torch.library.register_fake("gng_d2::group_norm_apply")
    def _(x, mean, rstd, weight, bias, num_groups, activation=None, residual=None):
        tensors = {"mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "residual": residual}
        refuse(_fault(x, num_groups, None, activation, **tensors))
        return torch.empty_like(x, memory_format=memory_format(x))

    @torch.library.register_fake("gng_d2::group_norm_backward")
    def _(dy, x, mean, rstd, weight, num_groups, activation=None, bias=None, kept=None):
        tensors = {"dy": dy, "mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "kept": kept}
        refuse(_fault(x, num_groups, None, activation, **tensors))
        dx = torch.empty_like(x, memory_format=memory_format(x))
        dweight = x.new_empty(x.shape[1], dtype=torch.float32)
        return dx, dweight, torch.empty_like(dweight), x.new_empty(0) if kept is None else torch.empty_like(dx)
