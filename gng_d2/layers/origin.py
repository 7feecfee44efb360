"""Which layer's output a tensor is: one rule, for training and for a run without gradients.

:mod:`.look` reads what autograd recorded, :mod:`.producers` watches the ops of a run. Both see the same
ops of PyTorch's dispatcher and pass each op to :func:`origin`, so that they always agree. docs/which-layer.md has the
rule as a table.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

from .kinds import Producer

__all__ = ["Origin", "UnseenLayer", "layer_output", "op_kind", "origin", "unseen"]


class Origin(NamedTuple):
    """What is known of a tensor."""

    # the layer whose output it is, or another op; None if this is unknown
    made: Producer | None
    shape: tuple[int, ...]
    size: tuple[int, ...]  # its shape before it was expanded
    # the last weight layers in its history, on all paths; at most two are kept, which stand for several
    layers: frozenset = frozenset()
    parameters: int = 0  # 2: a parameter, or a view of one; 1: made of parameters without a weight layer
    value: Any = None  # identifies the tensor; its views and copies have the same value
    source: Callable[[], "Origin | None"] | None = None  # for a layer's output: returns the origin of the layer's input


class UnseenLayer:
    """Stands among an origin's layers for an op that may hold a weight."""


# ops that keep the values, or whole channels, as they are; scale and sign of a norm's input do not matter
_KEPT = set(
    "view unsafeview reshapealias transpose t permute squeeze unsqueeze expand alias clone detach liftfresh tocopy "
    "copy neg flip roll nativedropout fuseddropout".split()
)
# ops that take or add some values: channels, or only positions
_CUTS = set(
    "slice select split splitwithsizes unsafesplit unsafesplitwithsizes unbind index indexselect constantpadnd "
    "reflectionpad1d reflectionpad2d reflectionpad3d replicationpad1d replicationpad2d replicationpad3d".split()
)
# sums, products and choices; in _OF_FIRST only the first operand can be the layer's output whose origin is kept
_SUMS = set("add sub rsub addcmul lerp".split())
_OF_ANY = _SUMS | set("mul maximum minimum fmax fmin where".split())
_OF_FIRST = set("div addcdiv maskedfill maskedscatter indexput indexadd copyslices".split())
_PRODUCTS = set("mm bmm addmm baddbmm".split())
# ops that repeat the only value of a channel at each position
_REPEATS = re.compile("^(expand|repeat|upsample)")
_HOLDS_NO_LAYER = re.compile("norm|^(cat|stack)$")


@cache
def op_kind(name: str) -> str:
    """One name for "aten::_unsafe_view", "UnsafeViewBackward0" and "unsafe_view_"."""
    return re.sub(r"backward\d*$|_", "", name.rpartition("::")[2].lower().replace("copybackwards", "copy"))


def origin(op: str, operands: Sequence[Origin | None], shape: tuple[int, ...], value: Any) -> Origin | None:
    """The origin of the output of ``op``, which is not a convolution, on ``operands``.

    Args:
        operands: the origins of its floating-point tensors, in order; None where nothing is known. Plain numbers may be
            left out.
        shape, value: those of the output.
    """
    kind = op_kind(op)
    if kind in _KEPT or kind in _CUTS:
        return _kept(op, operands[0], shape) if operands else Origin(Producer(op), shape, shape)
    if kind in _PRODUCTS:
        return _product(op, operands, shape, value)
    if kind in _OF_ANY or kind in _OF_FIRST:
        return _combined(op, operands, shape, value)
    known = [o for o in operands if o is not None]
    made = Origin(Producer(op), shape, shape, _layers(known), value=value)
    weights = [o for o in known if o.parameters == 2 and len(o.shape) > 1]
    if weights and len(weights) < len(operands) and not _HOLDS_NO_LAYER.search(kind):  # another kind of layer
        return made._replace(layers=made.layers | {value})
    same = len(known) == 1 and (shape == known[0].shape or _REPEATS.search(kind))
    return made._replace(
        parameters=_parameters(operands, shape),
        size=_size_before(known[0].size, shape) if same else shape,
    )


def unseen(operands: Sequence[Origin | None], shape: tuple[int, ...], value: Any) -> Origin:
    """The origin of the output of an op that may be a layer."""
    return Origin(None, shape, shape, _layers(operands) | {UnseenLayer()}, value=value)


def layer_output(
    op: str,
    sizes: tuple[int, int],
    weight: Origin | None,
    source: Callable[[], Origin | None],
    shape: tuple[int, ...],
    value: Any,
) -> Origin:
    """The origin of the output of a weight layer with ``sizes`` (n_in, n_out)."""
    parameter = weight.value if weight is not None and weight.parameters == 2 else None
    return Origin(Producer(op, *sizes, None, parameter), shape, shape, frozenset((value,)), 0, value, source)


def _layers(operands):
    """The layers of all ``operands``. Two are kept at most, which shows that there are several."""
    found = frozenset().union(*(o.layers for o in operands if o is not None))
    unseen_ones = list(filter(_is_unseen, found))
    return found if len(found) < 3 else frozenset([*unseen_ones[:1], *(found - {*unseen_ones})][:2])


def _parameters(operands, shape):
    """1 if the result was computed from parameters alone, as far as sizes show it, else 0."""
    made_of = [prod(o.shape) for o in operands if o is not None and o.parameters]
    return int(
        made_of != [] and not _layers(operands) and (len(made_of) == len(operands) or max(made_of) >= prod(shape))
    )


def _is_unseen(layer):
    return isinstance(layer, UnseenLayer)


def _is_layer(origin):
    return origin is not None and origin.made is not None and origin.made.is_layer


def _kept(op, operand, shape):
    if operand is None:
        return None
    made = operand.made
    if _is_layer(operand) and op_kind(op) in _CUTS:
        n_out, before = made.n_out, operand.shape
        whole = n_out in shape and (before[1:2] == shape[1:2] == (n_out,) or shape.count(n_out) >= before.count(n_out))
        made = made if whole else Producer(op)
    return operand._replace(made=made, shape=shape, size=_size_before(operand.size, shape))


def _size_before(size, shape):
    """``size``, if repeating single values turns it into ``shape``, else ``shape``."""
    repeated = len(size) <= len(shape) and all(s in (1, t) for s, t in zip(reversed(size), reversed(shape)))
    return size if repeated else shape


def _product(op, operands, shape, value):
    """The product of two matrices. It is a layer if one matrix is more certainly made of parameters than the other."""
    left, right = operands[-2:]
    ranks = [0 if o is None else o.parameters for o in (left, right)]
    if ranks == [2, 2]:
        return Origin(Producer(op), shape, shape, parameters=1, value=value)
    if ranks[1] and ranks[1] >= ranks[0]:
        made = layer_output(op, right.shape[-2:], right, lambda: left, shape, value)
    elif ranks[0] == 2 or (ranks[0] and right is not None):
        made = layer_output(op, left.shape[:-3:-1], left, lambda: right, shape, value)
    elif None in (left, right) or any(map(_is_unseen, _layers((left, right)))):  # one of them may be a frozen weight
        made = unseen((left, right), shape, value)
    else:
        made = Origin(Producer(op), shape, shape, _layers((left, right)), value=value)
    added = operands[:-2]
    return _combined("add", [made, *added], shape, value) if _layers(added) else made


def _combined(op, operands, shape, value):
    """A sum, product or choice. It keeps the origin of a layer's output if the other operands do not count."""
    counted = [o for o in operands if o is not None and o.layers and _is_full(o.size, shape)]
    hidden = any(o is None or (o.made is None and not o.layers) for o in operands)
    if not counted:
        known = [o for o in operands if o is not None]
        value = known[0].value if len(known) == 1 else value
        made = None if hidden else Producer(op)
        return Origin(made, shape, shape, _layers(known), _parameters(operands, shape), value)
    able = [o for o in counted if _is_layer(o) and (op_kind(op) in _OF_ANY or o is operands[0])]
    layers = _layers(counted)
    if len(layers) == 1:
        kept = able[0] if able else None
    else:
        kept = next((o for o in able if all(p is o or _is_adapter(p, o) for p in counted)), None)
    if kept is not None:
        if hidden and op_kind(op) in _SUMS and _is_adapter(kept):  # it may be the adapter of a frozen layer
            return Origin(None, shape, shape, layers, value=value)
        return kept._replace(shape=shape, size=shape, value=kept.value if len(counted) == 1 else value)
    if len(counted) == 1 and not _is_layer(counted[0]):
        return counted[0]._replace(shape=shape, size=shape)
    cannot_tell = any(o.made is None for o in counted) or any(map(_is_unseen, layers))
    return Origin(None if cannot_tell else Producer(op), shape, shape, layers, value=value)


def _is_full(size, shape):
    """Whether it has a number of its own for each channel and position."""
    return ((1,) * (len(shape) - len(size)) + size)[1:] == shape[1:]


def _is_adapter(added, layer=None):
    """Whether ``added`` is made from the input of ``layer`` by just two weight layers, the first a bottleneck."""
    down = added.source() if _is_layer(added) else None
    if not _is_layer(down) or down.made.n_out >= min(down.made.n_in, added.made.n_out):
        return False
    if layer is None:
        return True
    values = [None if o is None else o.value for o in (down.source(), layer.source())]
    return values[0] == values[1] and down.made.n_in == layer.made.n_in
