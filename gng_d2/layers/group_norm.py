"""Group normalization that learns its number of groups from the weight layer it follows.

Paper: Kim et al., "On the Ideal Number of Groups for Isometric Gradient Propagation".
"""

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from gng_d2.errors import InputError
from gng_d2.groups import checked_size, practical_num_groups
from gng_d2.ops import group_norm
from gng_d2.ops.backends import is_compiling, is_transformed

from .fx_leaf import call_as_leaf
from .look import MEND, look
from .module_path import module_path
from .record import norm_record, put_records, take_record
from .ws_conv import WS

# calls with gradients in which a norm looks which layer made its input
LOOKS = 16


class GroupNorm(nn.GroupNorm):
    r""":class:`torch.nn.GroupNorm` that knows the weight layer it follows.

    The channels are separated into groups. Each group is normalized as a whole, in each image separately:

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta

    Because it knows the layer, it can standardize the layer's weight, name the layer in its errors, and show in
    :func:`gng_d2.norm_table` how its groups compare with the ideal number.

    Args:
        num_groups: number of groups, a divisor of ``num_channels``.
        num_channels: channels of the input.
        eps, affine, device, dtype: as in :class:`torch.nn.GroupNorm`.
        weight_standardization: make the convolution that this norm follows a :class:`~gng_d2.WSConv2d` when it
            becomes the convolution's child (``conv.norm = norm``) or the next child of the same parent
            (``nn.Sequential(conv, norm)``).

    Shape:
        - Input, output: :math:`(N, C, *)` with :math:`C` = ``num_channels``.

    Raises:
        InputError: a number is not positive, or the groups do not divide the channels. In ``forward``: the input has
            another number of channels; each group would hold a single number, so that the output would not depend on
            the input; there is no convolution to standardize; or, in training, the layer that made the input is not
            the one that was standardized.

    Examples::
        >>> norm = GroupNorm(8, 64)
        >>> norm(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
        >>> nn.Sequential(nn.Conv2d(3, 64, 3), GroupNorm(8, 64, weight_standardization=True))[0]
        WSConv2d(3, 64, kernel_size=(3, 3), stride=(1, 1))
    """

    # False in the norm that a config calls GN, which computes the same bits as without this package
    uses_kernels: bool = True

    # the channels in each group, where a config asked for these (GN/<c>) and not for a number of groups
    channels_per_group: int | None = None
    # the size of its input, such as (1, 1), where convert_norms chose the groups for an input that a pooling made small
    pooled_to: tuple[int, ...] | None = None
    _looks = LOOKS  # looks that are still to come; a class attribute, because norms pickled by older versions have none
    # True while only the order of registration shows which layer it follows
    follows_registration: bool = False
    # True once fold_weight_standardization wrote the standardized weight into the weight layer
    weight_standardization_folded: bool = False

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        weight_standardization: bool = False,
    ):
        num_channels, num_groups = checked_size("num_channels", num_channels), checked_size("num_groups", num_groups)
        if num_channels % num_groups:
            raise InputError(f"num_groups={num_groups} does not divide num_channels={num_channels}")
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.weight_standardization = weight_standardization
        self.in_channels: int | None = None
        self.weight_layer: str | None = None

    def groups_after(self, in_channels: int) -> int | None:
        """The number of groups that it has after a layer with ``in_channels`` inputs; None if it has several sizes."""
        return self.num_groups

    def bind(self, in_channels: int, weight_layer: str) -> None:
        """Follow the layer that ``weight_layer`` describes and that has ``in_channels`` inputs."""
        num_groups = self.groups_after(in_channels)
        if num_groups and self.num_channels % num_groups:
            raise InputError(
                f"{self.norm_name()} cannot follow {weight_layer}: its {self.num_channels} output channels do not "
                f"divide into {num_groups} groups. Choose a divisor of {self.num_channels}, or PGN or GN/<c>, which "
                f"always take one."
            )
        self.num_groups = num_groups
        self.in_channels = in_channels
        self.weight_layer = weight_layer
        self.follows_registration = False

    def unbind(self) -> None:
        """Forget the layer."""
        self.in_channels = self.weight_layer = None
        self.follows_registration = False

    def lacks(self) -> str | None:
        """What it still lacks from its weight layer, so that it cannot run; None if nothing."""
        lacks_weight = self.weight_standardization and self.weight_layer is None
        return "there is no weight to standardize" if lacks_weight else None

    def is_bound(self) -> bool:
        """Whether it has what it needs from its weight layer, so that it can run."""
        return self.lacks() is None

    def norm_name(self) -> str:
        """The name by which a config asks for this norm, for instance "GN16+WS"."""
        if self.channels_per_group:
            name = f"GN/{self.channels_per_group}"
        else:
            name = "GN" if self.num_groups == 32 else f"GN{self.num_groups}"
        return name + WS * self.weight_standardization

    def recorded_groups(self) -> int | str | None:
        """What a checkpoint's record says of its groups; None if they are not known."""
        return self.num_groups

    def needs_layer(self) -> bool:
        """Whether it depends on which weight layer it follows."""
        return self.weight_standardization

    def look_again(self) -> None:
        """In the next calls with gradients, find out again which layer makes the input."""
        self.__dict__.pop("_looks", None)

    def train(self, mode: bool = True) -> "GroupNorm":
        self.look_again()  # the model may have been edited since the last looks
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(input, Proxy):
                return call_as_leaf(self, input)
        return self._normalize(input)

    def _normalize(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check(input)
            if not self.uses_kernels:
                return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def _check(self, input):
        # is_compiling() comes first: a compiler must not see the number of looks, which changes.
        if not is_compiling() and self._looks and self.needs_layer() and input.requires_grad:
            if torch.is_grad_enabled() and not is_transformed():
                self._looks -= 1
                look(self, input)
        if not self.is_bound():
            raise self.unbound_error()
        groups, channels = self.num_groups or 1, self.num_channels
        size = input.size(1) if input.dim() > 1 else 0
        if (type(size) is int and size != channels) or channels % groups:  # while tracing, size is a tensor
            raise self._shape_error(input.shape)
        # The group norm of a single number is the bias. PyTorch raises an error for this only with one image. While
        # tracing or exporting, sizes are not numbers.
        if groups == channels and not is_transformed() and all(size == 1 for size in input.shape[2:]):
            raise InputError(
                f"{module_path(self)}: each of the {groups} groups of this norm would hold a single number (input "
                f"{tuple(input.shape)}), so its output would not depend on its input. Give it a larger input or "
                f"another norm here, for instance GN1."
            )

    def unbound_error(self, reason: str = "") -> InputError:
        """The error of a norm that cannot run without a weight layer. ``reason`` says what was found instead."""
        return InputError(
            f"{module_path(self)}: this {self.norm_name()} never met a weight layer with {self.num_channels} output "
            f"channels, so {self.lacks()}{reason and ', and ' + reason}. {MEND}"
        )

    def _shape_error(self, shape):
        if self.num_groups and self.num_channels % self.num_groups:
            wrong = f"num_groups={self.num_groups} does not divide num_channels={self.num_channels}"
        else:
            wrong = f"it takes inputs (N, {self.num_channels}, *), not {tuple(shape)}"
        return InputError(f"{module_path(self)}: {wrong} in {self}")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # a dict of the caller's own has none
            put_records(destination, {prefix[:-1]: norm_record(self)})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        take_record(self, state_dict, prefix, local_metadata, args[-1])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        source = f", from {self.weight_layer}" if self.weight_layer else ""
        return (
            f"num_channels={self.num_channels}, num_groups={self.num_groups}"
            + f" ({self.norm_name()})" * bool(self.channels_per_group)
            + f", in_channels={self.in_channels}{source}, eps={self.eps}, affine={self.affine}"
            + ", weight_standardization=True" * self.weight_standardization
        )


class PracticalGroupNorm(GroupNorm):
    r"""Group norm with the practical number of groups of its unit block (Algorithm 1).

    Gradients keep their variance through weight layer, norm and ReLU where the number of groups is

    .. math:: G_{ideal} = (n_{in} - n_{out}) / 4

    (Eq. 32). The norm's number of groups is the divisor of :math:`n_{out}` nearest to this in :math:`\log_2`. Either
    ``in_channels`` is given, or the norm takes it from its weight layer when it becomes the layer's child
    (``conv.norm = norm``) or the next child of the same parent (``nn.Sequential(conv, norm)``), in
    :func:`gng_d2.bind_norms`, or in the first training step. Until then ``num_groups`` is None.

    Args:
        num_channels: channels of the input, :math:`n_{out}` of the weight layer. Note that the first argument of
            :class:`torch.nn.GroupNorm` is another one, the number of groups.
        in_channels: :math:`n_{in}` of the weight layer: all of its ``in_channels``, also where it is grouped or
            transposed. With None the norm takes it from the layer.
        eps, affine, device, dtype: as in :class:`torch.nn.GroupNorm`.
        gain_ratio: F/B of the activation that follows (Section 2.3), 1 for ReLU and its relatives; it multiplies
            :math:`n_{in}`.
        weight_standardization: as in :class:`GroupNorm`. The norm must meet its layer, so you cannot give
            ``in_channels``.

    Shape:
        - Input, output: :math:`(N, C, *)` with :math:`C` = ``num_channels``.

    Raises:
        InputError: as :class:`GroupNorm`. Also in ``forward``: the norm has met no weight layer, or, in training, the
            layer that made its input is not the one that it was bound to.

    Examples::
        >>> PracticalGroupNorm(64, in_channels=128).num_groups
        16
        >>> nn.Sequential(nn.Conv2d(256, 64, 1), PracticalGroupNorm(64))[1].num_groups
        64
    """

    num_groups: int | None

    def __init__(
        self,
        num_channels: int,
        in_channels: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        gain_ratio: float = 1.0,
        weight_standardization: bool = False,
    ):
        if weight_standardization and in_channels is not None:
            raise InputError(
                f"PracticalGroupNorm({num_channels}, in_channels={in_channels}, weight_standardization=True): to "
                f"standardize its convolution the norm has to meet it, and then takes in_channels from it. Leave out "
                f"one of the two"
            )
        # Sizes that have no number of groups raise an error here, where the caller sees it.
        num_groups = practical_num_groups(1 if in_channels is None else in_channels, num_channels, gain_ratio)
        super().__init__(
            num_groups, num_channels, eps, affine, device, dtype, weight_standardization=weight_standardization
        )
        self.num_groups = None if in_channels is None else num_groups
        self.in_channels = None if in_channels is None else int(in_channels)
        self.gain_ratio = gain_ratio

    def norm_name(self) -> str:
        return "PGN" + WS * self.weight_standardization

    def lacks(self) -> str | None:
        return "its number of groups is not known" if self.num_groups is None else super().lacks()

    def needs_layer(self) -> bool:
        return True

    def groups_after(self, in_channels: int) -> int:
        return practical_num_groups(in_channels, self.num_channels, self.gain_ratio)

    def unbind(self) -> None:
        super().unbind()
        self.num_groups = None

    def _shape_error(self, shape):
        error = super()._shape_error(shape)
        if shape[1:2] != (self.in_channels,):
            return error
        return InputError(
            f"{error}. PracticalGroupNorm's arguments are (num_channels, in_channels), not nn.GroupNorm's (num_groups, "
            f"num_channels): PracticalGroupNorm({shape[1]}) takes its number of groups from its layer"
        )
