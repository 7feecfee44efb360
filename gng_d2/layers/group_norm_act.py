"""Group norms that hold a dropout and an activation, as timm's norms do."""

import torch
from torch import Tensor
from torch.fx import Proxy

from .fx_leaf import call_as_leaf
from .group_norm import GroupNorm, PracticalGroupNorm
from .learned_group_norm import LearnedGroupNorm


class _WithActivation:
    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # repeats GroupNorm.forward, because TorchScript cannot call it from here
            if isinstance(input, Proxy):
                return call_as_leaf(self, input)
        return self.act(self.drop(self._normalize(input)))


class GroupNormAct(_WithActivation, GroupNorm):
    """:class:`GroupNorm`, then ``drop``, then ``act``, as in timm's GroupNormAct."""


class PracticalGroupNormAct(_WithActivation, PracticalGroupNorm):
    """:class:`PracticalGroupNorm`, then ``drop``, then ``act``, as in timm's GroupNormAct."""


class LearnedGroupNormAct(_WithActivation, LearnedGroupNorm):
    """:class:`LearnedGroupNorm`, then ``drop``, then ``act``, as in timm's GroupNormAct."""


WITH_ACTIVATION = {
    GroupNorm: GroupNormAct,
    PracticalGroupNorm: PracticalGroupNormAct,
    LearnedGroupNorm: LearnedGroupNormAct,
}
