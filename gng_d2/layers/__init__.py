from .binding import unbound_norms
from .group_norm import GroupNorm, PracticalGroupNorm
from .learned_group_norm import LearnedGroupNorm
from .ws_conv import WSConv2d

__all__ = ["GroupNorm", "LearnedGroupNorm", "PracticalGroupNorm", "WSConv2d", "unbound_norms"]
