"""Relatives of LGN that learn less or nothing. The ``--import`` of our tools takes this file.

    tools/compare.py --import configs/study/bccd_camvid.py tools/study/mixture_norm.py --norms GN LGN MIX-fixed ...

Every NORM key then takes these names, each of them also with ``+WS``:

==================  ================================================================================================
``MIX-slow``        LGN with mixtures that learn a tenth as fast
``MIX-shared``      LGN with one mixture for mean and variance
``MIX-uniform``     each group size has the same weight, and nothing is learned
``MIX-fixed``       the mean is taken over 1 channel and the variance over all channels, and nothing is learned
``MIX-fixed-last``  MIX-fixed in the last norm of each path of Detectron2's semantic head, GN in the others
==================  ================================================================================================
"""

import functools
import math

import torch
from detectron2.layers import Conv2d, batch_norm
from detectron2.modeling.meta_arch import semantic_seg
from torch import Tensor, nn

from gng_d2.layers import LearnedGroupNorm
from gng_d2.layers.ws_conv import WS


class MixtureNorm(LearnedGroupNorm):
    """LGN with other mixtures.

    Args:
        num_channels: channels of the input.
        rate: the mixtures are softmaxes of ``rate`` times :attr:`logits`. With None they are not learned.
        shared: whether mean and variance have the same mixture.
        fixed: without a ``rate``, the mean is over single channels and the variance over all of them. If it is False
            too, each group size has the same weight.
        name: the norm's name in a config.
    """

    def __init__(self, num_channels, *, rate=None, shared=False, fixed=False, name):
        super().__init__(num_channels, weight_standardization=name.endswith(WS))
        self.rate, self.fixed, self.name = rate, fixed, name
        if rate is None:
            self.logits.requires_grad_(False)
        elif shared:
            self.logits = nn.Parameter(self.logits[:1].detach())

    def weights(self) -> Tensor:
        if self.rate is not None:
            return (self.rate * self.logits).softmax(1).expand(2, -1)
        if self.fixed:
            return torch.eye(self.logits.shape[1], device=self.logits.device)[[0, -1]]
        return torch.full_like(self.logits, 1 / self.logits.shape[1])

    def norm_name(self) -> str:
        return self.name


NORMS = {
    "MIX-slow": {"rate": math.sqrt(10)},
    "MIX-shared": {"rate": 10, "shared": True},
    "MIX-uniform": {},
    "MIX-fixed": {"fixed": True},
    "MIX-fixed-last": {"fixed": True},
}


def _extend_get_norm():
    """Let Detectron2's ``get_norm`` make these norms. Ours calls it for each name that it does not know."""
    function = batch_norm.get_norm
    detectron2_get_norm = function.gng_d2_original

    @functools.wraps(detectron2_get_norm)
    def extended(norm, out_channels):
        if isinstance(norm, str) and norm.removesuffix(WS) in NORMS:
            return MixtureNorm(out_channels, **NORMS[norm.removesuffix(WS)], name=norm)
        return detectron2_get_norm(norm, out_channels)

    function.gng_d2_original = extended


def _extend_semantic_head():
    """Let the semantic head, once it is built, replace ``MIX-fixed-last`` by GN in all norms of a path but the last.
    The norm itself cannot know where it stands."""
    build = semantic_seg.SemSegFPNHead.__init__

    @functools.wraps(build)
    def extended(self, *args, **kwargs):
        build(self, *args, **kwargs)
        for path in self.scale_heads:
            *first, _ = (layer for layer in path if isinstance(layer, Conv2d))
            for layer in first:
                if getattr(layer.norm, "name", "").removesuffix(WS) == "MIX-fixed-last":
                    ws = WS * layer.norm.name.endswith(WS)
                    layer.norm = batch_norm.get_norm("GN" + ws, layer.out_channels)

    semantic_seg.SemSegFPNHead.__init__ = extended


_extend_get_norm()
_extend_semantic_head()
