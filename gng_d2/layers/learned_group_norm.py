"""Group norm that learns over how many channels it normalizes."""

import torch
from torch import Tensor, nn

from gng_d2.ops.learned_group_norm import group_sizes, learned_group_norm

from .group_norm import GroupNorm
from .ws_conv import WS


class LearnedGroupNorm(GroupNorm):
    r"""Group norm over groups of several sizes at once, which learns how much each of them counts.

    Mean and variance of each channel are two mixtures of those of the groups that it is in:

    .. math:: y = \frac{x - \sum_k a_k M_k}{\sqrt{\sum_k b_k V_k + \epsilon}} * \gamma + \beta

    :math:`M_k` and :math:`V_k` are mean and variance over groups of k channels of an image, and k is each power of two
    that divides the number of channels, and that number itself. So instance norm (k = 1) and layer norm (all channels)
    are among them. The mixtures a and b are softmaxes of 10 times :attr:`logits`, which begin at 0: each size counts
    the same.

    Args:
        num_channels: channels of the input.
        eps, affine, device, dtype: as in :class:`torch.nn.GroupNorm`.
        weight_standardization: as in :class:`GroupNorm`.

    Shape:
        - Input, output: :math:`(N, C, *)` with :math:`C` = ``num_channels``.

    Raises:
        InputError: as :class:`GroupNorm`.

    Examples::
        >>> norm = LearnedGroupNorm(24)
        >>> norm(torch.randn(2, 24, 7, 7)).shape, list(norm.mixtures()["variance"])
        (torch.Size([2, 24, 7, 7]), [1, 2, 4, 8, 24])
    """

    num_groups: int | None  # None: it has groups of all sizes

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        weight_standardization: bool = False,
    ):
        super().__init__(1, num_channels, eps, affine, device, dtype, weight_standardization=weight_standardization)
        self.num_groups = None
        self.logits = nn.Parameter(torch.zeros(2, len(group_sizes(num_channels)), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "logits"):  # nn.GroupNorm calls this before there are any
            nn.init.zeros_(self.logits)

    def mixtures(self) -> dict[str, dict[int, float]]:
        """How much each group counts in the ``"mean"`` and in the ``"variance"``, by its number of channels."""
        sizes = group_sizes(self.num_channels)
        return {name: dict(zip(sizes, of.tolist())) for name, of in zip(("mean", "variance"), self.weights())}

    def weights(self) -> Tensor:
        """The mixtures, (2, K), with a column for each of :func:`gng_d2.ops.group_sizes`; gradients flow through."""
        # With the factor of 10 SGD moves them 100 times as fast; they would hardly move otherwise.
        return (10 * self.logits.float()).softmax(1)

    def recorded_groups(self) -> str:
        return "learned"

    def norm_name(self) -> str:
        return "LGN" + WS * self.weight_standardization

    def _normalize(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check(input)
        return learned_group_norm(input, self.weights(), self.weight, self.bias, self.eps)
