from .binding import bind_norms, unbound_norms
from .group_norm import GroupNorm, PracticalGroupNorm
from .ws_conv import WSConv2d, fold_weight_standardization, standardize_weight

__all__ = [
    "GroupNorm",
    "PracticalGroupNorm",
    "WSConv2d",
    "bind_norms",
    "fold_weight_standardization",
    "standardize_weight",
    "unbound_norms",
]
