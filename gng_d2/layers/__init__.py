from .practical_group_norm import GroupNorm, PracticalGroupNorm
from .weight_standardization import WSConv2d, fold_weight_standardization, standardize_weight

__all__ = [
    "GroupNorm",
    "PracticalGroupNorm",
    "WSConv2d",
    "fold_weight_standardization",
    "standardize_weight",
]
