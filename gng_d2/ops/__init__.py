from .backends import set_kernels_enabled
from .group_norm import group_norm
from .learned_group_norm import group_sizes, learned_group_norm
from .weight_standardization import standardize_weight

__all__ = ["group_norm", "group_sizes", "learned_group_norm", "set_kernels_enabled", "standardize_weight"]
