"""Group normalization for Detectron2 whose number of groups follows from each layer's shape.

Importing it is all that a Detectron2 program needs: every ``NORM`` key then takes the names of
:mod:`gng_d2.layers.norm_names`, such as ``PGN`` and ``PGN+WS``.
"""

import logging
import sys
from importlib import import_module

from torch import nn

from .gains import activation_gains
from .groups import ideal_num_groups, isometry_ratio, practical_num_groups
from .layers import GroupNorm, LearnedGroupNorm, PracticalGroupNorm, WSConv2d, unbound_norms
from .layers.binding import install_binding_hook
from .layers.norm_names import extend_get_norm
from .models.bind_norms import bind_norms
from .models.calibrate_norms import calibrate_norms
from .models.convert_norms import convert_norms
from .models.fold import fold_weight_standardization
from .models.fuse_norms import fuse_norms
from .models.norm_table import norm_table
from .models.recompute_norms import recompute_norms, recomputed_modules
from .models.to_plain import to_plain
from .ops.backends import HAS_DETECTRON2

__all__ = [
    "GroupNorm",
    "LearnedGroupNorm",
    "PracticalGroupNorm",
    "WSConv2d",
    "activation_gains",
    "bind_norms",
    "calibrate_norms",
    "check_norm_keys",
    "convert_norms",
    "fold_weight_standardization",
    "fuse_norms",
    "get_config_file",
    "ideal_num_groups",
    "isometry_ratio",
    "norm_table",
    "practical_num_groups",
    "recompute_norms",
    "recomputed_modules",
    "to_plain",
    "unbound_norms",
]

__version__ = "0.3.0"

# what needs Detectron2 is loaded when it is asked for
_OF_THE_JOB = {"check_norm_keys": "norm_keys", "get_config_file": "model_zoo"}


def __getattr__(name):
    if name not in _OF_THE_JOB:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.job.{_OF_THE_JOB[name]}"), name)


install_binding_hook()
# PyTorch's eager quantization looks modules up by their exact class, so it would leave our norms in float
_quantization = sys.modules.get("torch.ao.quantization.quantization_mappings")
_quantized = getattr(_quantization, "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS", {})
if nn.GroupNorm in _quantized:
    _quantized[GroupNorm] = _quantized[PracticalGroupNorm] = _quantized[nn.GroupNorm]
if HAS_DETECTRON2:
    extend_get_norm()
    logging.getLogger(__name__).parent = logging.getLogger("detectron2")  # whose setup_logger writes log.txt
