"""Norms whose mean and variance are taken over different groups. The ``--import`` of our tools takes this file.

    tools/compare.py --import configs/study/bccd_camvid.py tools/study/mixture_norm.py --norms GN MIX MIX-fixed ...

Every NORM key then takes these names, each of them also with ``+WS``:

==================  ================================================================================================
``MIX``             mean and variance are two learned mixtures over groups of 1, 2, 4, ... and all channels
``MIX-slow``        the same with mixtures that learn a tenth as fast
``MIX-shared``      mean and variance share one learned mixture
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
from torch.nn.modules.module import register_module_module_registration_hook

from gng_d2.layers.ws_conv import standardize

WS = "+WS"


class MixtureNorm(nn.InstanceNorm2d):
    r"""A norm of single images whose mean and variance are mixtures over group sizes.

    .. math:: y = \gamma \frac{x - \sum_k a_k M_k}{\sqrt{\sum_k b_k V_k + \epsilon}} + \beta

    where :math:`M_k` and :math:`V_k` are mean and variance over groups of k channels. k is each power of two that
    divides the number of channels, and the number of channels itself. All of them follow from the mean and variance of
    each channel of each image, so that only these two are computed from the input.

    Args:
        num_features: the number of channels.
        rate: the weights are a softmax of ``rate`` times logits, which are learned and begin at 0. Under SGD the
            weights learn ``rate`` squared times as fast as with a rate of 1. With None the weights are not learned.
        shared: whether a and b are the same mixture.
        fixed: without a ``rate``, a is 1 for single channels and b is 1 for all channels. If it is False too, each
            group size has the same weight.
        name: the norm's name in a config.

    Shape:
        - Input, output: :math:`(N, C, *)` with :math:`C` = ``num_features``.

    Examples::
        >>> norm = MixtureNorm(64, rate=10)
        >>> norm.sizes, norm(torch.randn(2, 64, 7, 7)).shape
        ([1, 2, 4, 8, 16, 32, 64], torch.Size([2, 64, 7, 7]))
    """

    def __init__(self, num_features, *, rate=None, shared=False, fixed=False, name="MIX"):
        super().__init__(num_features, affine=True)
        powers = (2**i for i in range(num_features.bit_length()))
        self.sizes = [*(k for k in powers if k < num_features and num_features % k == 0), num_features]
        self.rate, self.fixed, self.name = rate, fixed, name
        if rate is not None:
            self.logits = nn.Parameter(torch.zeros(1 if shared else 2, len(self.sizes)))

    def mixtures(self) -> tuple[Tensor, Tensor]:
        """The weights of :attr:`sizes` in the mean and in the variance."""
        if self.rate is not None:
            weights = (self.rate * self.logits).softmax(1)
            return weights[0], weights[-1]
        if self.fixed:
            first, last = torch.eye(len(self.sizes), device=self.weight.device)[[0, -1]]
            return first, last
        uniform = self.weight.new_full((len(self.sizes),), 1 / len(self.sizes))
        return uniform, uniform

    def forward(self, input: Tensor) -> Tensor:
        own_variance, own_mean = torch.var_mean(input.flatten(2), 2, correction=0)
        means = self._over_groups(own_mean)
        squares = self._over_groups(own_variance + own_mean.square())
        of_mean, of_variance = self.mixtures()
        mean = torch.tensordot(of_mean, means, 1)
        # rounding may make the difference negative
        variance = torch.tensordot(of_variance, squares - means.square(), 1).clamp(min=0)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        shape = (*scale.shape, *[1] * (input.dim() - 2))
        return torch.addcmul(shift.view(shape), input, scale.view(shape))

    def subtracted(self, means: Tensor) -> Tensor:
        """What the norm subtracts from each channel, (N, C), if the channels have these ``means``, (N, C)."""
        of_mean, _ = self.mixtures()
        return torch.tensordot(of_mean.to(means), self._over_groups(means), 1)

    def _over_groups(self, values):
        """The mean of ``values`` (N, C) over each channel's group, for each of the sizes."""
        groups = (values.unflatten(1, (-1, size)) for size in self.sizes)
        return torch.stack([group.mean(2, keepdim=True).expand_as(group).flatten(1) for group in groups])

    def extra_repr(self) -> str:
        return f"{self.num_features}, {self.name}"


NORMS = {
    "MIX": {"rate": 10},
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


def _standardize_layer(parent, name, norm):
    if isinstance(norm, MixtureNorm) and norm.name.endswith(WS) and isinstance(parent, Conv2d):
        standardize(parent, norm.name)


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
register_module_module_registration_hook(_standardize_layer)
_extend_semantic_head()
