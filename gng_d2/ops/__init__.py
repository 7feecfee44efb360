from .group_norm import group_norm

__all__ = ["group_norm"]
