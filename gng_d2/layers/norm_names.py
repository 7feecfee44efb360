"""From a norm's name, such as "PGN+WS", to the norm and back: the one place that knows the names."""

import difflib
import re
import types
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from gng_d2.errors import InputError
from gng_d2.groups import nearest_divisor

from .group_norm import GroupNorm, PracticalGroupNorm
from .learned_group_norm import LearnedGroupNorm
from .ws_conv import WS

# <k>: any number of groups, <c>: of channels in each group
_BASES = ("PGN", "LGN", "GN<k>", "GN/<c>", "GN")
OURS = (*_BASES, *(name + WS for name in _BASES))
THEIRS = ("LN", "BN", "FrozenBN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")  # Detectron2's
KNOWN_NORMS = (*OURS, *THEIRS)

_CLASSES = {"PGN": PracticalGroupNorm, "LGN": LearnedGroupNorm}
_NAMES = {"FrozenBatchNorm2d": "FrozenBN", "BatchNorm2d": "BN", "SyncBatchNorm": "SyncBN", "LayerNorm": "LN"}


def norm_from_name(name: str) -> Callable | None:
    """A function that makes the norm ``name`` for a number of channels; None where ``name`` is not one of ours.

    ============  =================================================================
    ``PGN``       :class:`~gng_d2.layers.PracticalGroupNorm`
    ``LGN``       :class:`~gng_d2.layers.LearnedGroupNorm`
    ``GN``        :class:`~gng_d2.layers.GroupNorm` with 32 groups
    ``GN<k>``     the same with k groups
    ``GN/<c>``    the same with c channels in each group; ``GN/1`` is instance norm
    ``...+WS``    any of these, with a weight-standardized convolution
    ============  =================================================================

    Examples::
        >>> norm_from_name("GN16+WS")(64)
        GroupNorm(num_channels=64, num_groups=16, in_channels=None, eps=1e-05, affine=True, weight_standardization=True)
    """
    match = re.fullmatch(r"(PGN|LGN|GN([1-9]\d*)?|GN/([1-9]\d*))(\+WS)?", name)
    if match is None:
        return None
    base, groups, channels, standardized = match.groups()
    if base in _CLASSES:
        make = _CLASSES[base]
    elif channels:
        make = partial(_with_channels_per_group, int(channels))
    else:
        make = partial(_with_groups, int(groups or 32), uses_kernels=name != "GN")
    return partial(make, weight_standardization=True) if standardized else make


def _with_groups(num_groups, num_channels, uses_kernels, **options):
    """Divisibility is checked when the norm meets its layer, so that the error can name the layer."""
    norm = GroupNorm(1, num_channels, **options)
    norm.num_groups, norm.uses_kernels = num_groups, uses_kernels
    return norm


def _with_channels_per_group(channels, num_channels, **options):
    norm = GroupNorm(num_channels // nearest_divisor(num_channels, channels), num_channels, **options)
    norm.channels_per_group = channels
    return norm


def norm_name(norm: nn.Module) -> str:
    """The name by which a config asks for such a norm; its class name where there is none.

    Examples::
        >>> norm_name(PracticalGroupNorm(64, weight_standardization=True)), norm_name(nn.GroupNorm(4, 64))
        ('PGN+WS', 'GN4')
    """
    if isinstance(norm, GroupNorm):
        return norm.norm_name()
    if isinstance(norm, nn.GroupNorm):
        return "GN" if norm.num_groups == 32 else f"GN{norm.num_groups}"
    return _NAMES.get(type(norm).__name__, type(norm).__name__)


def unknown_norm(name: str, known_norms: Sequence[str] = KNOWN_NORMS) -> InputError:
    examples = (known.replace("<k>", "1").replace("<c>", "1") for known in known_norms)
    names = {example.upper(): example for example in examples}
    near = difflib.get_close_matches(name.upper(), names, 1)
    meant = f"; did you mean {names[near[0]]!r}?" if near else "."
    known = ", ".join(known_norms)
    return InputError(
        f"unknown norm {name!r}{meant} Known norms: {known} (<k>: a number of groups, <c>: of channels in each group)"
    )


def get_norm(norm, out_channels, detectron2_get_norm):
    """Detectron2's ``get_norm(norm, out_channels)`` with our names added.

    Raises:
        InputError: the name is neither ours nor Detectron2's.
    """
    if not isinstance(norm, str):
        return detectron2_get_norm(norm, out_channels)
    make = norm_from_name(norm)
    if make is not None:
        return make(out_channels)
    try:
        return detectron2_get_norm(norm, out_channels)
    except KeyError:
        raise unknown_norm(norm) from None


_extended: list[Callable] = []  # Detectron2's get_norm, once it is extended


def extend_get_norm() -> None:
    """Add our names to Detectron2's ``get_norm``, also where it was imported already.

    Detectron2's modules import the function by name, so the function itself has to change: its code is
    replaced, and ``gng_d2_original`` keeps the original function. A second call does nothing.
    """
    from detectron2.layers import batch_norm

    function = batch_norm.get_norm
    if hasattr(function, "gng_d2_original"):
        return
    if function.__closure__:
        raise InputError(
            f"detectron2.layers.get_norm was replaced by {function.__module__}, so gng_d2 cannot add its norms to it. "
            f"Import gng_d2 before {function.__module__}"
        )
    function.gng_d2_original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    _extended.append(function)

    def extended(norm, out_channels):
        # This code runs as the code of Detectron2's function, with the globals of that function's module, so it imports
        # what it needs. It takes the function from a list, because another package may have reused its name.
        from gng_d2.layers.norm_names import _extended, get_norm

        return get_norm(norm, out_channels, _extended[0].gng_d2_original)

    function.__code__ = extended.__code__
