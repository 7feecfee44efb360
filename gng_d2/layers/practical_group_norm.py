"""Where whole models that were pickled before version 0.2 look for their norms."""

from .group_norm import GroupNorm, PracticalGroupNorm  # noqa: F401
