"""Weight standardization: the weight of a convolution, with mean 0 and deviation 1 in each output filter.

Paper: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization".
"""

from functools import partial

import torch
from torch import Tensor

from . import cpu_kernels, weight_standardization_cpu
from .backends import HAS_OPS, HAS_TRITON, is_compiling, is_on, is_ordinary, kernels_may_run
from .checks import check_memory, fault_of, refuse

_BACKENDS = {"cpu": weight_standardization_cpu} if cpu_kernels.is_compiled() else {}
if HAS_TRITON:
    from . import weight_standardization_triton

    _BACKENDS["cuda"] = weight_standardization_triton

_EPS = 1e-5


def standardize_weight(weight: Tensor) -> Tensor:
    """The weight less its mean, over its deviation plus 1e-5, of each output filter: (w - mean) / (std + 1e-5).

    The deviation is the unbiased one. A filter of equal weights becomes 0. A filter of a single weight, which has no
    deviation, is left as it is. Where a kernel of ours can, it takes one launch forward and one backward.

    Shape:
        - Input, output: :math:`(C_{out}, *)`. Computed in float32 at least, returned in the input's type.

    Examples::
        >>> standardize_weight(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    if weight.numel() == weight.shape[0]:
        return weight
    if not torch.jit.is_scripting():
        if _backend(weight) is not None:
            return _Standardize.apply(weight)
    return _standardize(weight)


def _backend(weight):
    """The backend that takes this weight, None for PyTorch's ops, which torch.compile fuses."""
    backend = _BACKENDS.get(weight.device.type) if kernels_may_run() and not is_compiling() else None
    if backend is None or not is_ordinary(weight) or _fault(weight, backend.DTYPES):
        return None
    return backend if is_on(weight.device) else None


def _standardize(weight: Tensor, eps: float = _EPS) -> Tensor:  # an argument, as TorchScript reads no global number
    """In PyTorch's ops."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    filters = wide.flatten(1)
    deviation = filters - filters.mean(1, keepdim=True)
    # torch.std takes eight times as long on a CPU
    std = torch.linalg.vector_norm(deviation, dim=1, keepdim=True) / (filters.shape[1] - 1) ** 0.5
    return (deviation / (std + eps)).view(weight.shape).to(weight.dtype)


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return torch.ops.gng_d2.standardize.default(weight, _EPS)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient that can be differentiated again
            return torch.autograd.grad(_standardize(weight), weight, gradient, create_graph=True)[0]
        return torch.ops.gng_d2.standardize_backward.default(gradient, weight, _EPS)


def _fault(weight, dtypes=None, **others):
    """What is wrong with the tensors of an op, None if nothing is."""
    shape = () if weight is None else weight.shape
    if len(shape) < 2 or not weight.numel() > shape[0]:
        return f"a weight of shape {tuple(shape)} has no filters of two weights or more"
    tensors = {"the weight": weight, **others}
    faults = (fault_of(name, t, shape, weight.device, dtypes) for name, t in tensors.items())
    return next((fault for fault in faults if fault is not None), None)


def _forward(backend, weight, eps):
    """The op: what ``backend`` computes, after checking all that it relies on."""
    refuse(_fault(weight, backend.DTYPES))
    check_memory(weight)
    return backend.forward(weight.contiguous(), eps)


def _backward(backend, gradient, weight, eps):
    refuse(_fault(weight, backend.DTYPES, gradient=gradient))
    check_memory(gradient, weight)
    return backend.backward(gradient.contiguous(), weight.contiguous(), eps)


if HAS_OPS:
    torch.library.define("gng_d2::standardize", "(Tensor weight, float eps) -> Tensor")
    torch.library.define("gng_d2::standardize_backward", "(Tensor gradient, Tensor weight, float eps) -> Tensor")
    for _device, _kernels in _BACKENDS.items():
        torch.library.impl("gng_d2::standardize", _device)(partial(_forward, _kernels))
        torch.library.impl("gng_d2::standardize_backward", _device)(partial(_backward, _kernels))

    @torch.library.register_fake("gng_d2::standardize")
    def _(weight, eps):
        refuse(_fault(weight))
        return torch.empty_like(weight, memory_format=torch.contiguous_format)

    @torch.library.register_fake("gng_d2::standardize_backward")
    def _(gradient, weight, eps):
        refuse(_fault(weight, gradient=gradient))
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
