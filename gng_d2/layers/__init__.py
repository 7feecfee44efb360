from .binding import unbound_norms
from .group_norm import GroupNorm, PracticalGroupNorm
from .ws_conv import WSConv2d

__all__ = ["GroupNorm", "PracticalGroupNorm", "WSConv2d", "unbound_norms"]
