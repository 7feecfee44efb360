from .bind_norms import bind_norms
from .calibrate_norms import calibrate_norms
from .convert_norms import convert_norms
from .fold import fold_weight_standardization
from .fuse_norms import fuse_norms
from .norm_table import norm_table
from .recompute_norms import recompute_norms, recomputed_modules
from .to_plain import to_plain

__all__ = [
    "bind_norms",
    "calibrate_norms",
    "convert_norms",
    "fold_weight_standardization",
    "fuse_norms",
    "norm_table",
    "recompute_norms",
    "recomputed_modules",
    "to_plain",
]
