"""Group normalization for Detectron2 whose number of groups follows from each layer's shape.

Importing it is all that a Detectron2 program needs: every ``NORM`` key then takes the names of
:mod:`gng_d2.layers.norm_names`, such as ``PGN`` and ``PGN+WS``.
"""

from importlib import import_module

from .gains import activation_gains
from .groups import ideal_num_groups, isometry_ratio, practical_num_groups
from .layers import GroupNorm, PracticalGroupNorm, WSConv2d, unbound_norms
from .layers.binding import install_binding_hook
from .layers.norm_names import extend_get_norm
from .models import (
    bind_norms,
    convert_norms,
    fold_weight_standardization,
    norm_table,
    recompute_norms,
    recomputed_modules,
)
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

# what needs Detectron2 is loaded when it is asked for
_OF_THE_JOB = {"check_norm_keys": "norm_keys", "get_config_file": "model_zoo"}


def __getattr__(name):
    if name not in _OF_THE_JOB:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.job.{_OF_THE_JOB[name]}"), name)


install_binding_hook()
if HAS_DETECTRON2:
    extend_get_norm()
