from .bind_norms import bind_norms
from .calibrate_norms import calibrate_norms
from .convert_norms import convert_norms
from .fold import fold_weight_standardization
from .norm_table import norm_table
from .recompute_norms import recompute_norms, recomputed_modules

__all__ = [
    "bind_norms",
    "calibrate_norms",
    "convert_norms",
    "fold_weight_standardization",
    "norm_table",
    "recompute_norms",
    "recomputed_modules",
]
