"""A model's norms, their groups and the paper's K, before it trains."""

from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .errors import InputError
from .groups import ideal_num_groups, isometry_ratio
from .layers import GroupNorm, WSConv2d
from .layers.binding import layer_shape, named_norms

__all__ = ["build_on_meta", "norm_name", "num_groups", "norm_table"]


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The model of ``cfg`` without memory for its weights: for its structure, in a second.

    Raises:
        InputError: Detectron2 cannot build it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            return build_model(cfg)
    except InputError:
        raise
    except Exception as error:  # of any kind: it runs every constructor that the config names
        raise InputError(f"the model of this config cannot be built: {type(error).__name__}: {error}") from error


def norm_name(norm: nn.Module) -> str:
    """The name by which a config asks for such a norm; its class where it has none."""
    if isinstance(norm, GroupNorm):
        return norm.norm_name()
    if isinstance(norm, nn.GroupNorm):
        return "GN" if norm.num_groups == 32 else f"GN{norm.num_groups}"
    names = {"FrozenBatchNorm2d": "FrozenBN", "BatchNorm2d": "BN", "SyncBatchNorm": "SyncBN", "LayerNorm": "LN"}
    return names.get(type(norm).__name__, type(norm).__name__)


def num_groups(norm: nn.Module) -> Optional[int]:
    """Groups of a group or layer norm; None for a norm over the batch."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    return 1 if type(norm).__name__ == "LayerNorm" else None


def norm_table(model: nn.Module) -> List[Dict]:
    """One row for each norm of ``model``, in its order.

    Keys: ``name`` and ``norm`` of the norm, ``layer``: name of its weight layer, ``n_in`` and ``n_out``
    of that layer, ``num_groups``, ``ideal_num_groups`` (Eq. 32), ``isometry_ratio`` (K, Eq. 31),
    ``weight_standardized``. What is not known (a norm without a weight layer) or does not apply (groups
    of a batch norm) is None.
    """
    rows = []
    for name, norm, layer_name, layer in named_norms(model):
        n_in, n_out = layer_shape(layer) if layer is not None else (None, None)
        gain_ratio = getattr(norm, "gain_ratio", 1.0)
        groups = num_groups(norm)
        rows.append(
            {
                "name": name,
                "norm": norm_name(norm),
                "layer": layer_name,
                "n_in": n_in,
                "n_out": n_out,
                "num_groups": groups,
                "ideal_num_groups": ideal_num_groups(n_in, n_out, gain_ratio) if layer is not None else None,
                "isometry_ratio": isometry_ratio(n_in, n_out, groups, gain_ratio)
                if layer is not None and groups
                else None,
                "weight_standardized": isinstance(layer, WSConv2d),
            }
        )
    return rows
