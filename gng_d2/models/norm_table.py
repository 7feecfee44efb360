"""A model's norms, their groups and the paper's K, before it trains."""

import math
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial

from tabulate import tabulate
from torch import nn

from gng_d2.groups import ideal_num_groups, isometry_ratio
from gng_d2.layers import GroupNorm, LearnedGroupNorm, WSConv2d
from gng_d2.layers.binding import named_norms
from gng_d2.layers.kinds import NO_LAYER, layer_sizes, num_channels, num_groups
from gng_d2.layers.norm_names import norm_name
from gng_d2.ops.backends import is_ordinary


@dataclass(frozen=True)
class NormRow:
    """One norm of a model, with its weight layer and its groups. None: the value is unknown or does not apply."""

    name: str  # its path in the model
    norm: str  # the name by which a config asks for it, such as "PGN+WS"; its class name if there is none
    layer: str | None  # the path of its weight layer, or a description such as "Conv2d(256, 64)"
    n_in: int | None  # input channels of that layer; the norm's own width where no single layer feeds it
    n_out: int | None  # output channels of that layer
    num_groups: int | None
    channels_per_group: int | tuple[float, ...] | None  # LGN: the geometric means over its two mixtures
    ideal_num_groups: float | None  # Eq. 32
    isometry_ratio: float | None  # K, Eq. 31: the gradient's variance before the block over that after it
    weight_standardized: bool


@dataclass(frozen=True)
class CalibratedNormRow(NormRow):
    """One norm that :func:`~gng_d2.calibrate_norms` gave its affine."""

    calibration_error: float  # how far its output was from the reference's, in deviations of the reference's


class NormTable(list[NormRow]):
    """Rows of :func:`norm_table`. It prints as a table."""

    _HEADERS = {
        "num_groups": "groups",
        "channels_per_group": "channels/group",
        "ideal_num_groups": "ideal",
        "isometry_ratio": "K",
        "weight_standardized": "WS",
    }

    def __str__(self):
        calibrated = any(isinstance(row, CalibratedNormRow) for row in self)
        names = [field.name for field in fields(CalibratedNormRow if calibrated else NormRow)]
        lines = [[getattr(row, name, None) for name in names] for row in self]
        return tabulate(lines, [self._HEADERS.get(name, name) for name in names], missingval="-")


def norm_table(model: nn.Module) -> NormTable:
    """One row for each norm of ``model``, in its order: norms of ours, of PyTorch and of Detectron2.

    Any model will do, also on the meta device. The result is a list that prints as a table;
    ``dataclasses.asdict(row)`` is a row for JSON.

    Examples::
        >>> (row,) = norm_table(nn.Sequential(nn.Conv2d(64, 128, 3), nn.GroupNorm(32, 128)))
        >>> row.layer, row.n_in, row.num_groups, row.ideal_num_groups, row.isometry_ratio
        ('0', 64, 32, -16.0, 4.0)
    """
    return NormTable(_row(*found) for found in named_norms(model))


def _row(name, norm, layer_name, layer):
    n_in, n_out = (None, None) if layer is None else layer_sizes(layer)
    standardized = isinstance(layer, WSConv2d)
    if layer is None and isinstance(norm, GroupNorm) and norm.in_channels is not None:
        layer_name, n_in, n_out = norm.weight_layer, norm.in_channels, norm.num_channels
        standardized = norm.weight_standardization and norm.weight_layer != NO_LAYER
    groups, gain_ratio = num_groups(norm), getattr(norm, "gain_ratio", 1.0)
    error = getattr(norm, "calibration_error", None)
    make = NormRow if error is None else partial(CalibratedNormRow, calibration_error=error)
    return make(
        name=name,
        norm=norm_name(norm),
        layer=layer_name,
        n_in=n_in,
        n_out=n_out,
        num_groups=groups,
        channels_per_group=_channels_per_group(norm, groups),
        ideal_num_groups=None if n_in is None else ideal_num_groups(n_in, n_out, gain_ratio),
        isometry_ratio=None if n_in is None or not groups else isometry_ratio(n_in, n_out, groups, gain_ratio),
        weight_standardized=standardized,
    )


def _channels_per_group(norm, groups):
    if isinstance(norm, LearnedGroupNorm) and is_ordinary(norm.logits) and not norm.logits.is_meta:
        mixtures = norm.mixtures().values()
        return tuple(round(math.prod(size**weight for size, weight in of.items()), 1) for of in mixtures)
    return None if groups is None else num_channels(norm) // groups


def norm_summary(model: nn.Module) -> str:
    """One line for a log: how many norms ``model`` has, their groups, and which norms have no groups.

    Examples::
        >>> norm_summary(nn.Sequential(nn.Conv2d(64, 128, 3), nn.GroupNorm(32, 128), nn.BatchNorm2d(128)))
        '2 norms: 1 x 32 groups; 1 x BN'
    """
    rows = norm_table(model)
    groups = Counter(row.num_groups for row in rows if row.num_groups is not None)
    others = Counter(row.norm for row in rows if row.num_groups is None)
    with_groups = ", ".join(f"{count} x {number}" for number, count in sorted(groups.items()))
    parts = [f"{with_groups} groups"] * bool(groups) + [f"{count} x {name}" for name, count in others.items()]
    return f"{len(rows)} norms: {'; '.join(parts) or 'none'}"
