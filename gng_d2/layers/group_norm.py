"""Group normalization that learns its number of groups from the weight layer it follows.

Paper: Kim et al., "On the Ideal Number of Groups for Isometric Gradient Propagation".
"""

import gc
from typing import Optional

import torch
from torch import Tensor, nn

from gng_d2.errors import InputError
from gng_d2.groups import practical_num_groups
from gng_d2.ops import group_norm

from .ws_conv import standardize

__all__ = ["GroupNorm", "PracticalGroupNorm"]


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` that checks itself against the weight layer it follows.

    Detectron2 makes a norm before the layer that it belongs to. So that ``num_groups`` divides
    ``num_channels`` is checked when the two meet (:meth:`bind`), with the layer's name in the error.

    Args:
        num_groups: groups to separate the channels into.
        num_channels: channels of the input.
        eps, affine: as in :class:`torch.nn.GroupNorm`.
        weight_standardization: make the weight layer a :class:`~gng_d2.layers.WSConv2d` when the two meet.

    Shape:
        - Input, output: :math:`(N, C, *)` with :math:`C` = ``num_channels``.

    Raises:
        InputError: in ``forward``, where each group would hold a single number, whose normalization
            is 0 whatever the input, or where there is no weight layer to standardize.
    """

    # where a config asked for channels in each group (GN/<c>) instead of groups: what it asked for
    channels_per_group: Optional[int] = None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        weight_standardization: bool = False,
    ):
        super().__init__(1, num_channels, eps, affine)
        self.num_groups = num_groups
        self.weight_standardization = weight_standardization
        self.in_channels: Optional[int] = None
        self.weight_layer: Optional[str] = None

    def bind(self, weight_layer: nn.Module, in_channels: int) -> None:
        """Take ``weight_layer``, with ``in_channels`` input channels, as the layer that feeds this norm."""
        if self.num_channels % self.num_groups:
            raise InputError(
                f"{self.norm_name()} cannot follow {_describe(weight_layer)}: its {self.num_channels} "
                f"output channels do not divide into {self.num_groups} groups. Choose a divisor of "
                f"{self.num_channels}, or PGN, which does."
            )
        if self.weight_standardization:
            standardize(weight_layer, self.norm_name())
        self.in_channels = in_channels
        self.weight_layer = _describe(weight_layer)

    def norm_name(self) -> str:
        """The name by which a config asks for this norm, for instance "GN16+WS"."""
        if self.channels_per_group:
            name = f"GN/{self.channels_per_group}"
        else:
            name = "GN" if self.num_groups == 32 else f"GN{self.num_groups}"
        return name + "+WS" * self.weight_standardization

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check(input)
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def _check(self, input):
        if self.weight_standardization and self.weight_layer is None:
            raise self._unbound_error("so there is no weight to standardize")
        # Group norm of a single number is its bias: PyTorch refuses it for one image only.
        single = self.num_groups == self.num_channels and all(size == 1 for size in input.shape[2:])
        if single and not torch.jit.is_tracing():
            raise InputError(
                f"{_module_path(self)}: each of the {self.num_groups} groups of this norm would hold a single "
                f"number (input {tuple(input.shape)}), so its output would not depend on its input. Give it a "
                f"larger input or another norm here, for instance GN1."
            )

    def _unbound_error(self, consequence):
        return InputError(
            f"{_module_path(self)}: this {self.norm_name()} never met a weight layer with {self.num_channels} "
            f"output channels, {consequence}. Register it as `norm` of its convolution or right after it in "
            f"the same module (PGN without WS also takes in_channels=)"
        )

    def extra_repr(self) -> str:
        source = f", from {self.weight_layer}" if self.weight_layer else ""
        return (
            f"{self.num_channels}, num_groups={self.num_groups}"
            + f" ({self.norm_name()})" * bool(self.channels_per_group)
            + f", in_channels={self.in_channels}{source}, eps={self.eps}, affine={self.affine}"
            + ", weight_standardization=True" * self.weight_standardization
        )


class PracticalGroupNorm(GroupNorm):
    """Group norm with the practical number of groups of its unit block (Algorithm 1).

    The number of groups needs the input channels of the weight layer before the norm. Either they
    are given, or the norm takes them when it becomes a child of that layer (``conv.norm = norm``) or
    of the same parent right after it (``nn.Sequential(conv, norm)``). ``num_groups`` is None until then.

    Args:
        num_channels: channels of the input, the output channels of the weight layer.
        in_channels: input channels of the weight layer. None: taken from the layer.
        gain_ratio: F/B of the activation that follows (Section 2.3), 1 for ReLU and its relatives.
        eps, affine, weight_standardization: as in :class:`GroupNorm`.

    Shape:
        - Input, output: :math:`(N, C, *)` with :math:`C` = ``num_channels``.

    Raises:
        InputError: in ``forward``, where it never met a weight layer, or where each group would hold
            a single number.

    Examples::
        >>> PracticalGroupNorm(64, in_channels=128).num_groups
        16
        >>> nn.Sequential(nn.Conv2d(256, 64, 1), PracticalGroupNorm(64))[1].num_groups
        64
    """

    num_groups: Optional[int]

    def __init__(
        self,
        num_channels: int,
        in_channels: Optional[int] = None,
        *,
        gain_ratio: float = 1.0,
        eps: float = 1e-5,
        affine: bool = True,
        weight_standardization: bool = False,
    ):
        # Fails here, where the caller sees it, for sizes that have no number of groups.
        num_groups = practical_num_groups(1 if in_channels is None else in_channels, num_channels, gain_ratio)
        super().__init__(
            None if in_channels is None else num_groups,
            num_channels,
            eps=eps,
            affine=affine,
            weight_standardization=weight_standardization,
        )
        self.in_channels = in_channels
        self.gain_ratio = gain_ratio

    def bind(self, weight_layer: nn.Module, in_channels: int) -> None:
        self.num_groups = practical_num_groups(in_channels, self.num_channels, self.gain_ratio)
        super().bind(weight_layer, in_channels)

    def norm_name(self) -> str:
        return "PGN" + "+WS" * self.weight_standardization

    def _check(self, input):
        if self.num_groups is None:
            raise self._unbound_error("so its number of groups is not known")
        super()._check(input)


def _describe(weight_layer):
    """For instance "Conv2d(256, 128)"."""
    shape = [str(v) for k, v in vars(weight_layer).items() if k in _SIZES]
    return f"{type(weight_layer).__name__}({', '.join(shape)})"


_SIZES = ("in_channels", "out_channels", "in_features", "out_features")


def _module_path(module):
    """The dotted name of ``module`` below the outermost live module that holds it."""
    parents = {}
    for parent in gc.get_objects():
        if issubclass(type(parent), nn.Module):
            for name, child in parent.__dict__.get("_modules", {}).items():
                parents.setdefault(id(child), (parent, name))
    names, seen = [], set()
    while id(module) in parents and id(module) not in seen:
        seen.add(id(module))
        module, name = parents[id(module)]
        names.insert(0, name)
    return ".".join(names) or type(module).__name__
