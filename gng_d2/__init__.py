"""Group normalization for Detectron2 whose number of groups follows from each layer's shape.

Importing it is all that a Detectron2 program needs: every ``NORM`` key then takes ``PGN``,
``GN<k>``, ``GN/<c>``, and each with ``+WS``.
"""

from .analysis import norm_table
from .gains import activation_gains
from .groups import ideal_num_groups, isometry_ratio, practical_num_groups
from .layers import (
    GroupNorm,
    PracticalGroupNorm,
    WSConv2d,
    bind_norms,
    fold_weight_standardization,
    unbound_norms,
)
from .layers.binding import install_binding_hook
from .layers.convert_norms import convert_norms
from .layers.recompute import recompute_norms, recomputed_modules
from .model_zoo import get_config_file
from .norm_keys import check_norm_keys
from .norm_names import extend_get_norm
from .ops.backends import HAS_DETECTRON2

__all__ = [
    "GroupNorm",
    "PracticalGroupNorm",
    "WSConv2d",
    "activation_gains",
    "bind_norms",
    "check_norm_keys",
    "convert_norms",
    "fold_weight_standardization",
    "get_config_file",
    "ideal_num_groups",
    "isometry_ratio",
    "norm_table",
    "practical_num_groups",
    "recompute_norms",
    "recomputed_modules",
    "unbound_norms",
]

__version__ = "0.2.0"

install_binding_hook()
if HAS_DETECTRON2:
    extend_get_norm()
