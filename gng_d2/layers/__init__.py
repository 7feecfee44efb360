from .group_norm import GroupNorm, PracticalGroupNorm

__all__ = ["GroupNorm", "PracticalGroupNorm"]
