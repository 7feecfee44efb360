"""Convolution with standardized weights.

Paper: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization".
"""

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.utils import parametrize

from gng_d2.errors import InputError
from gng_d2.ops import standardize_weight
from gng_d2.ops.backends import HAS_DETECTRON2

from .fx_leaf import call_as_leaf
from .recompute import change_class, original_class

__all__ = ["WSConv2d", "standardize", "unstandardize", "fold_weight_standardization"]

if HAS_DETECTRON2:
    from detectron2.layers import Conv2d
else:

    class Conv2d(nn.Conv2d):
        """What of Detectron2's ``Conv2d`` is needed where it is not installed."""

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

    ``weight`` stays the raw parameter: initializers, checkpoints, optimizers and weight decay see what they
    always see. Arguments and shapes are those of :class:`detectron2.layers.Conv2d`, and ``padding_mode`` is that of
    :class:`torch.nn.Conv2d`.

    Examples::
        >>> conv = WSConv2d(16, 32, 3, padding=1)
        >>> conv(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 32, 8, 8])
    """

    __constants__ = [*nn.Conv2d.__constants__, "applies_norm"]

    # False in what was an nn.Conv2d, which applies no norm, not even one that is its child
    applies_norm: bool = True

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


def standardize(layer: nn.Module, norm_name: str) -> None:
    """Turn ``layer``, a convolution that a norm called ``norm_name`` follows, into a :class:`WSConv2d`.

    By its class, as PyTorch's lazy modules do: the layer may be under construction, and its parameters,
    children and hooks stay. Nothing but the weight changes: Detectron2's ``Conv2d`` pads with zeros whatever its
    ``padding_mode``, so that is set to "zeros"; ``nn.Conv2d`` pads by its own, and applies no norm.

    Raises:
        InputError: for anything but exactly ``nn.Conv2d`` or Detectron2's ``Conv2d``.
    """
    if original_class(layer) is WSConv2d:
        return
    if original_class(layer) not in (Conv2d, nn.Conv2d):
        from gng_d2.norm_names import without_ws  # which imports this file

        raise InputError(
            f"{norm_name} cannot follow a {type(layer).__name__}: only Conv2d can be weight-standardized. "
            f"Use {without_ws(norm_name)} there"
        )
    if original_class(layer) is nn.Conv2d:
        layer.applies_norm = False
    else:
        layer.padding_mode = "zeros"
    change_class(layer, WSConv2d)


def unstandardize(layer: WSConv2d) -> None:
    """Turn ``layer`` back into what it was before :func:`standardize`."""
    change_class(layer, _folded_class(layer))
    layer.__dict__.pop("applies_norm", None)


def fold_weight_standardization(model: nn.Module) -> nn.Module:
    """Replace, in place, each :class:`WSConv2d` by a plain convolution with the standardized weight.

    This is for inference: the outputs are the same, and the weights are no longer standardized in every forward. Each
    folded layer has a new parameter, so that whatever else holds the raw weight (another layer, an optimizer) keeps it;
    two standardized layers that share a weight go on sharing it. A folded layer, and the norms of the model that
    asked for standardization, have ``weight_standardization_folded`` set. Folding again changes nothing.

    Returns:
        ``model``.

    Raises:
        InputError: for a layer that cannot be folded without changing what the model computes, by its name. The model
            is then as it was.

    Examples::
        >>> model = torch.nn.Sequential(WSConv2d(16, 32, 3), torch.nn.ReLU())
        >>> type(fold_weight_standardization(model)[0]).__name__
        'Conv2d'
    """
    named = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, WSConv2d) or _is_folded(layer)]
    for name, layer in named:
        obstacle = _changed_since_folded(layer) if _is_folded(layer) else _obstacle(layer)
        if obstacle:
            name = name or type(layer).__name__
            raise InputError(f"{name}: its weight standardization cannot be folded, because {obstacle}")
    layers = [layer for _, layer in named if not _is_folded(layer)]
    sharing = {}
    for layer in layers:
        sharing.setdefault(id(layer.weight), []).append(layer)
    for group in sharing.values():
        raw = group[0].weight
        with torch.no_grad():
            weight = torch.empty_like(raw).copy_(standardize_weight(raw))  # in the layout of raw
        weight = nn.Parameter(weight, raw.requires_grad)
        for layer in group:
            layer.weight = weight
            change_class(layer, _folded_class(layer))
            layer.__dict__.pop("applies_norm", None)
            layer.weight_standardization_folded = True
    for norm in model.modules() if layers else ():
        if getattr(norm, "weight_layer", None) is not None:
            norm.weight_layer = norm.weight_layer.replace("WSConv2d", "Conv2d")
            if norm.weight_standardization:
                norm.weight_standardization, norm.weight_standardization_folded = False, True
    return model


def _is_folded(layer):
    folded = isinstance(layer, nn.Conv2d) and getattr(layer, "weight_standardization_folded", False)
    return folded and not isinstance(layer, WSConv2d)  # which it becomes again before another norm


def _folded_class(layer):
    """The class whose forward is that of ``layer``, but for the standardization; None where there is none."""
    if not layer.applies_norm:
        return nn.Conv2d
    if layer.padding_mode == "zeros":
        return Conv2d
    return nn.Conv2d if layer.norm is None and layer.activation is None else None


def _obstacle(layer):
    """Why a plain convolution would not compute what ``layer`` does; None if it would."""
    if parametrize.is_parametrized(layer):
        return "it is parametrized. Call torch.nn.utils.parametrize.remove_parametrizations first"
    if original_class(layer) is not WSConv2d or {"forward", "_conv_forward"} & vars(layer).keys():
        return f"its forward may not be that of WSConv2d (it is a {type(layer).__name__}). Fold the model before that"
    if layer._parameters.get("weight") is None:
        return (
            "its weight is no parameter, but computed, as by torch.nn.utils.prune, weight_norm or spectral_norm. "
            "Remove that first (prune.remove, remove_weight_norm, remove_spectral_norm)"
        )
    if layer.weight.is_meta:
        return "its weight is on the meta device. Load weights first"
    if _folded_class(layer) is None:
        return f"with a norm or an activation a plain Conv2d has no padding_mode {layer.padding_mode!r}"
    return None


def _changed_since_folded(layer):
    """Why the weight of a folded ``layer`` is no longer a standardized one; None if it is."""
    filters = layer.weight.detach().flatten(1).double()
    if filters.is_meta or filters.shape[1] < 2:
        return None
    std, mean = torch.std_mean(filters, 1)  # std: s / (s + 1e-5) where it was s, so less than 1 if s was small
    tolerance = max(1e-3, torch.finfo(layer.weight.dtype).eps)
    standardized = mean.abs().max() < tolerance and std.max() < 1 + tolerance and std.max() > 0.1
    if standardized or not filters.any():
        return None
    return (
        "it was folded before, and then its weight changed (load_state_dict, training). Make the model anew, load or "
        "train it, and fold it then"
    )
