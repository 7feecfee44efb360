"""Group normalization for Detectron2 whose number of groups follows from each layer's shape.

Importing it is all that a Detectron2 program needs: every ``NORM`` key then takes ``PGN``,
``GN<k>``, and either with ``+WS``.
"""

from importlib.util import find_spec

from .gains import activation_gains
from .groups import ideal_num_groups, isometry_ratio, practical_num_groups
from .layers import (
    GroupNorm,
    PracticalGroupNorm,
    WSConv2d,
    binding,  # noqa: F401  installs the hook by which norms meet their weight layers
    fold_weight_standardization,
)
from .layers.recompute import recompute_norms, recomputed_modules
from .norm_names import extend_get_norm

__all__ = [
    "GroupNorm",
    "PracticalGroupNorm",
    "WSConv2d",
    "activation_gains",
    "fold_weight_standardization",
    "ideal_num_groups",
    "isometry_ratio",
    "practical_num_groups",
    "recompute_norms",
    "recomputed_modules",
]

if find_spec("detectron2") is not None:
    extend_get_norm()
