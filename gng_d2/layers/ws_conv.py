"""Convolution with standardized weights.

Paper: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization".
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from gng_d2.errors import InputError
from gng_d2.ops import cpu_kernels, weight_standardization_cpu
from gng_d2.ops.backends import HAS_OPS, HAS_TRITON, TRITON_TYPES, is_transformed, triton_works

if HAS_TRITON:
    from gng_d2.ops import weight_standardization_triton

__all__ = ["WSConv2d", "standardize_weight", "standardize", "fold_weight_standardization"]

_EPS = 1e-5

if find_spec("detectron2") is not None:
    from detectron2.layers import Conv2d
else:

    class Conv2d(nn.Conv2d):
        """What of Detectron2's ``Conv2d`` is needed where it is not installed."""

        def __init__(self, *args, norm=None, activation=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.norm = norm
            self.activation = activation


def standardize_weight(weight: Tensor) -> Tensor:
    """(w - mean) / (std + 1e-5) of each output filter, with the unbiased standard deviation.

    A filter of equal weights becomes 0. A filter of a single weight, which has no deviation, is left as
    it is.

    Shape:
        - Input, output: :math:`(C_{out}, *)`. Computed in float32 at least, returned in the input's type.

    Examples::
        >>> standardize_weight(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    if weight.numel() == weight.shape[0]:
        return weight
    if not torch.jit.is_scripting():
        if _is_for_kernels(weight):
            return _Standardize.apply(weight)
    return _standardize(weight)


def _standardize(weight: Tensor, eps: float = _EPS) -> Tensor:  # an argument, as TorchScript reads no global number
    """In PyTorch's ops, which torch.compile fuses."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    filters = wide.flatten(1)
    deviation = filters - filters.mean(1, keepdim=True)
    # torch.std takes eight times as long on a CPU
    std = torch.linalg.vector_norm(deviation, dim=1, keepdim=True) / (filters.shape[1] - 1) ** 0.5
    return (deviation / (std + eps)).view(weight.shape).to(weight.dtype)


def _is_for_kernels(weight):
    """Whether one kernel forward and one backward can do it."""
    if not HAS_OPS or is_transformed() or torch.compiler.is_compiling():
        return False
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_contiguous() or not weight.numel():
        return False
    if weight.is_cpu:
        return weight.dtype == torch.float32 and cpu_kernels.is_compiled()
    return weight.is_cuda and weight.dtype in TRITON_TYPES and HAS_TRITON and triton_works(weight.device.index)


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


if HAS_OPS:
    torch.library.define("gng_d2::standardize", "(Tensor weight, float eps) -> Tensor")
    torch.library.define("gng_d2::standardize_backward", "(Tensor gradient, Tensor weight, float eps) -> Tensor")
    if cpu_kernels.is_compiled():
        torch.library.impl("gng_d2::standardize", "cpu")(cpu_kernels.checked(weight_standardization_cpu.forward))
        torch.library.impl("gng_d2::standardize_backward", "cpu")(
            cpu_kernels.checked(weight_standardization_cpu.backward)
        )
    if HAS_TRITON:
        torch.library.impl("gng_d2::standardize", "cuda")(weight_standardization_triton.forward)
        torch.library.impl("gng_d2::standardize_backward", "cuda")(weight_standardization_triton.backward)
    torch.library.register_fake("gng_d2::standardize")(lambda weight, eps: torch.empty_like(weight))
    torch.library.register_fake("gng_d2::standardize_backward")(lambda gradient, weight, eps: torch.empty_like(weight))


class WSConv2d(Conv2d):
    """Detectron2's ``Conv2d`` that convolves with the standardized weight.

    ``weight`` stays the raw parameter: initializers, checkpoints, optimizers and weight decay see what they
    always see. Arguments and shapes are those of :class:`detectron2.layers.Conv2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, standardize_weight(self.weight), self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def standardize(layer: nn.Module, norm_name: str) -> None:
    """Turn ``layer``, a convolution that a norm called ``norm_name`` follows, into a :class:`WSConv2d`.

    By its class, as PyTorch's lazy modules do: the layer may be under construction, and its parameters,
    children and hooks stay.

    Raises:
        InputError: for anything but exactly ``nn.Conv2d`` or Detectron2's ``Conv2d``.
    """
    if type(layer) is WSConv2d:
        return
    if type(layer) not in (Conv2d, nn.Conv2d):
        raise InputError(
            f"{norm_name} cannot follow a {type(layer).__name__}: only Conv2d can be weight-standardized. "
            f"Use {norm_name.removesuffix('+WS')} there"
        )
    if type(layer) is nn.Conv2d:
        layer.norm = layer.activation = None
    layer.__class__ = WSConv2d


def fold_weight_standardization(model: nn.Module) -> nn.Module:
    """Replace, in place, each :class:`WSConv2d` by a plain convolution with the standardized weight.

    For inference: the outputs are the same, and the weights are no longer standardized in every forward.
    Returns ``model``.
    """
    layers = [layer for layer in model.modules() if type(layer) is WSConv2d]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():  # tied weights once
            weight.copy_(standardize_weight(weight))
    for layer in layers:
        layer.__class__ = Conv2d
    return model
