"""Convolution with standardized weights.

Paper: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization".
"""

import logging

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from gng_d2.errors import InputError
from gng_d2.ops import standardize_weight
from gng_d2.ops.backends import HAS_DETECTRON2

from .class_change import add, has, is_changeable, original_class, remove
from .fx_leaf import call_as_leaf
from .module_path import module_path

# the end of the name of a norm that standardizes its convolution
WS = "+WS"

if HAS_DETECTRON2:
    from detectron2.layers import Conv2d
else:

    class Conv2d(nn.Conv2d):  # type: ignore[no-redef]
        """What is needed of Detectron2's ``Conv2d``, where Detectron2 is not installed."""

        def __init__(self, *args, norm=None, activation=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.norm = norm
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            if self.norm is not None:
                x = self.norm(x)
            if self.activation is not None:
                x = self.activation(x)
            return x


class WSConv2d(Conv2d):
    """Detectron2's ``Conv2d`` that convolves with the standardized weight.

    ``weight`` stays the raw parameter, so that initializers, checkpoints, optimizers and weight decay work as
    always. Arguments and shapes are those of :class:`detectron2.layers.Conv2d`, and ``padding_mode`` is that of
    :class:`torch.nn.Conv2d`.

    Examples::
        >>> conv = WSConv2d(16, 32, 3, padding=1)
        >>> conv(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 32, 8, 8])
    """

    __constants__ = [*nn.Conv2d.__constants__, "applies_norm"]

    # False if it was an nn.Conv2d before, which does not apply a norm even if it has one as a child
    applies_norm: bool = True
    # the innermost of the ways in which a convolution can run
    order = 0

    @classmethod
    def wrap(cls, wrapped: type) -> type:
        return cls

    @staticmethod
    def unwrap(layer: nn.Module, made: type) -> type:
        return plain_class(layer) or made

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(x, Proxy):
                return call_as_leaf(self, x)
        x = self._conv_forward(x, standardize_weight(self.weight), self.bias)
        if self.applies_norm:
            if self.norm is not None:
                x = self.norm(x)
            if self.activation is not None:
                x = self.activation(x)
        return x


WSConv2d._way_of_running = WSConv2d  # not inherited: a subclass may have another forward


def standardize(layer: nn.Module, norm_name: str) -> None:
    """Turn ``layer``, a convolution that a norm called ``norm_name`` follows, into a :class:`WSConv2d`.

    The layer gets another class, as PyTorch's lazy modules do, so it may be under construction, and its parameters,
    children and hooks stay. Except for the weight, its outputs stay the same. Detectron2's ``Conv2d`` ignores its
    ``padding_mode`` and pads with zeros, so the mode becomes "zeros". An ``nn.Conv2d`` keeps its mode and applies no
    norm.

    Raises:
        InputError: the class of ``layer`` is not exactly ``nn.Conv2d`` or Detectron2's ``Conv2d``.
    """
    if has(layer, WSConv2d):
        return
    check_standardizable(layer, norm_name)
    kind = original_class(layer)
    weight = layer._parameters.get("weight")
    if type(weight) is nn.Parameter and not weight.is_meta and not weight.any():
        logging.getLogger(__name__).warning(
            f"{module_path(layer)}: all weights of this {type(layer).__name__} are zero, and {norm_name} divides them "
            f"by their standard deviation + 1e-5, so the first gradient is 100,000 times as large as without +WS. "
            f"Use {norm_name.removesuffix(WS)} there, or other initial weights"
        )
    if kind is nn.Conv2d:
        layer.applies_norm = False
    else:
        layer.padding_mode = "zeros"
    add(layer, WSConv2d)


def can_be_standardized(layer: nn.Module) -> bool:
    """Whether the class of ``layer`` is exactly ``nn.Conv2d`` or Detectron2's ``Conv2d``, or it is standardized."""
    return has(layer, WSConv2d) or (original_class(layer) in (Conv2d, nn.Conv2d, WSConv2d) and is_changeable(layer))


def check_standardizable(layer: nn.Module, norm_name: str) -> None:
    """Raise an InputError if ``layer`` cannot be standardized for a norm called ``norm_name``."""
    if not can_be_standardized(layer):
        kind = original_class(layer)
        raise InputError(
            f"{norm_name} cannot follow a {kind.__module__}.{kind.__qualname__}: only the Conv2d of "
            f"torch.nn and of Detectron2 can be weight-standardized. Use {norm_name.removesuffix(WS)} there"
        )


def plain_class(layer):
    """The class whose forward differs from that of ``layer`` only in the standardization; None if there is none."""
    if not layer.applies_norm:
        return nn.Conv2d
    if layer.padding_mode == "zeros":
        return Conv2d
    return nn.Conv2d if layer.norm is None and layer.activation is None else None


def unstandardize(layer: WSConv2d) -> None:
    """Undo :func:`standardize`."""
    remove(layer, WSConv2d)
    layer.__dict__.pop("applies_norm", None)
