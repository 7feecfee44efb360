"""Write standardized weights into plain convolutions, for inference."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from gng_d2.errors import InputError
from gng_d2.layers.class_change import has, ways_of
from gng_d2.layers.ws_conv import WSConv2d, plain_class, unstandardize
from gng_d2.ops import standardize_weight


def fold_weight_standardization(model: nn.Module) -> nn.Module:
    """Replace, in place, each :class:`WSConv2d` by a plain convolution with the standardized weight.

    This is for inference: the outputs are the same, and the weights are no longer standardized in every forward. Each
    folded layer has a new parameter, so that whatever else holds the raw weight (another layer, an optimizer) keeps it;
    two standardized layers that share a weight go on sharing it. A folded layer, and the norms of the model that
    asked for standardization, have ``weight_standardization_folded`` set. Folding again changes nothing.

    Returns:
        ``model``.

    Raises:
        InputError: folding would change what the model computes; the message names the layer. The model is then
            unchanged.

    Examples::
        >>> model = torch.nn.Sequential(WSConv2d(16, 32, 3), torch.nn.ReLU())
        >>> type(fold_weight_standardization(model)[0]).__name__
        'Conv2d'
    """
    layers = []
    for name, layer in model.named_modules():
        obstacle = None
        if isinstance(layer, WSConv2d):
            layers.append(layer)
            obstacle = _obstacle(layer)
        elif isinstance(layer, nn.Conv2d) and getattr(layer, "weight_standardization_folded", False):
            obstacle = _changed_since_folded(layer)
        if obstacle:
            name = name or type(layer).__name__
            raise InputError(f"{name}: its weight standardization cannot be folded, because {obstacle}")
    folded: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        raw = layer.weight
        if raw not in folded:
            with torch.inference_mode(False), torch.no_grad():  # the new parameter is an ordinary one
                weight = torch.empty_like(raw).copy_(standardize_weight(raw))  # keeps the layout of raw
                folded[raw] = nn.Parameter(weight, raw.requires_grad)
        layer.weight = folded[raw]
        unstandardize(layer)
        layer.weight_standardization_folded = True
    for norm in model.modules() if layers else ():
        if getattr(norm, "weight_layer", None) is not None:
            norm.weight_layer = norm.weight_layer.replace("WSConv2d", "Conv2d")
            if norm.weight_standardization:
                norm.weight_standardization, norm.weight_standardization_folded = False, True
    return model


def _obstacle(layer):
    """Why a plain convolution would not compute what ``layer`` computes; None if it would."""
    if parametrize.is_parametrized(layer):
        return "it is parametrized. Call torch.nn.utils.parametrize.remove_parametrizations first"
    is_subclass = type(layer) not in ways_of(layer).values()
    if is_subclass or not has(layer, WSConv2d) or {"forward", "_conv_forward"} & vars(layer).keys():
        return f"its forward may not be that of WSConv2d (it is a {type(layer).__name__}). Fold the model before that"
    if layer._parameters.get("weight") is None:
        return (
            "its weight is not a parameter but computed, as by torch.nn.utils.prune, weight_norm or spectral_norm. "
            "Remove that first (prune.remove, remove_weight_norm, remove_spectral_norm)"
        )
    if layer.weight.is_meta:
        return "its weight is on the meta device. Load weights first"
    if plain_class(layer) is None:
        return f"with a norm or an activation a plain Conv2d has no padding_mode {layer.padding_mode!r}"
    return None


def _changed_since_folded(layer):
    """Why the weight of a folded ``layer`` is no longer standardized; None if it is."""
    filters = layer.weight.detach().flatten(1).double()
    if filters.is_meta or filters.shape[1] < 2:
        return None
    std, mean = torch.std_mean(filters, 1)  # a deviation that was s is s / (s + 1e-5) now, which is below 1
    tolerance = max(1e-3, torch.finfo(layer.weight.dtype).eps)
    standardized = mean.abs().max() < tolerance and std.max() < 1 + tolerance and std.max() > 0.1
    if standardized or not filters.any():
        return None
    return (
        "it was folded before, and then its weight changed (load_state_dict, training). Make the model anew, load or "
        "train it, and fold it then"
    )
