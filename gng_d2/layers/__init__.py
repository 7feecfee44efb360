from .group_norm import GroupNorm, PracticalGroupNorm
from .ws_conv import WSConv2d, fold_weight_standardization, standardize_weight

__all__ = [
    "GroupNorm",
    "PracticalGroupNorm",
    "WSConv2d",
    "fold_weight_standardization",
    "standardize_weight",
]
