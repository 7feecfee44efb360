from .backends import set_kernels_enabled
from .group_norm import group_norm
from .weight_standardization import standardize_weight

__all__ = ["group_norm", "set_kernels_enabled", "standardize_weight"]
