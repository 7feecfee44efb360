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


class Origin(NamedTuple):
    """What is known of a tensor."""

    # the layer whose output it is, or another op; None if this is unknown
    made: Producer | None
    shape: tuple[int, ...]
    size: tuple[int, ...]  # its shape before it was expanded
    layers: frozenset = frozenset()  # the values of the last weight layers in its history, on all paths
    parameters: int = 0  # 2: a parameter, or a view of one; 1: made of parameters without a weight layer
    value: Any = None  # identifies the tensor; its views and copies have the same value
    source: Callable[[], "Origin"] | None = None  # for a layer's output: returns the origin of the layer's input
    conv_groups: int = 1  # for a convolution's output: into how many groups it divides the channels


# the origin of a frozen part, an input or a plain number in training, which cannot tell these apart
UNKNOWN = Origin(None, (), ())
# stands among an origin's layers for an op that may hold a weight
_UNSEEN = object()

# ops that keep the values, or whole channels, as they are; scale and sign of a norm's input do not matter
_KEPT = set(
    "view unsafeview reshapealias transpose t permute squeeze unsqueeze expand alias clone detach liftfresh tocopy "
    "copy neg flip roll nativedropout fuseddropout".split()
)
_VIEWS = set("view unsafeview reshapealias".split())
# ops that take or add some values: channels, or only positions
_CUTS = set(
    "slice select split splitwithsizes unsafesplit unsafesplitwithsizes unbind asstrided index indexselect "
    "constantpadnd reflectionpad1d reflectionpad2d reflectionpad3d replicationpad1d replicationpad2d "
    "replicationpad3d".split()
)
# sums, products and choices; in _OF_FIRST only the first operand can be the layer's output whose origin is kept
_SUMS = set("add sub rsub addcmul lerp".split())
_OF_ANY = _SUMS | set("mul maximum minimum fmax fmin where".split())
_OF_FIRST = set("div addcdiv maskedfill maskedscatter indexput indexadd copyslices".split())
_PRODUCTS = set("mm bmm addmm baddbmm".split())
# ops of quantization-aware training, which round each value
_ROUNDS = re.compile("fakequantize|fusedmovingavgobsfq")
# ops that repeat the only value of a channel at each position
_REPEATS = re.compile("^(expand|repeat|upsample)")
_HOLDS_NO_LAYER = re.compile("norm|^(cat|stack)$")


@cache
def op_kind(name: str) -> str:
    """One name for "aten::_unsafe_view", "UnsafeViewBackward0" and "unsafe_view_"."""
    return re.sub(r"backward\d*$|_", "", name.rpartition("::")[2].lower().replace("copybackwards", "copy"))


def origin(op: str, operands: Sequence[Origin], shape: tuple[int, ...], value: Any) -> Origin:
    """The origin of the output of ``op``, which is not a convolution, on ``operands``.

    Args:
        operands: the origins of its floating-point tensors, in order. Plain numbers may be left out.
        shape, value: those of the output.
    """
    kind, made = op_kind(op), Origin(Producer(op), shape, shape, _layers(operands), value=value)
    if not operands:
        return made
    if kind in _KEPT or kind in _CUTS or _ROUNDS.match(kind):
        return _kept(op, operands[-1 if kind == "copy" else 0], shape)  # copy_(destination, source)
    if kind in _PRODUCTS:
        return _product(op, operands, shape, value)
    if kind in _OF_ANY or kind in _OF_FIRST:
        return _combined(op, operands, shape, value)
    weights = [o for o in operands if o.parameters == 2 and len(o.shape) > 1]
    if weights and len(weights) < len(operands) and not _HOLDS_NO_LAYER.search(kind):  # another kind of layer
        return made._replace(layers=made.layers | {value})
    known = [o for o in operands if o is not UNKNOWN]
    if len(known) == 1 and (shape == known[0].shape or _REPEATS.search(kind)):
        made = made._replace(size=_size_before(known[0].size, shape))
    return made._replace(parameters=_parameters(operands, shape))


def unseen(operands: Sequence[Origin], shape: tuple[int, ...], value: Any) -> Origin:
    """The origin of the output of an op that may be a layer."""
    return Origin(None, shape, shape, _layers(operands) | {_UNSEEN}, value=value)


def layer_output(
    op: str,
    sizes: tuple[int, int],
    weight: Origin,
    source: Callable[[], Origin],
    shape: tuple[int, ...],
    value: Any,
    conv_groups: int = 1,
) -> Origin:
    """The origin of the output of a weight layer with ``sizes`` (n_in, n_out)."""
    parameter = weight.value if weight.parameters == 2 else None
    made = Producer(op, *sizes, None, parameter)
    return Origin(made, shape, shape, frozenset((value,)), 0, value, source, conv_groups)


def _layers(operands):
    return frozenset().union(*(o.layers for o in operands))


def _parameters(operands, shape):
    """1 if the result was computed from parameters alone, as far as sizes show it, else 0."""
    sizes = [prod(o.shape) for o in operands if o.parameters]
    if not sizes or _layers(operands):
        return 0
    return int(len(sizes) == len(operands) or max(sizes) >= prod(shape))


def _is_layer(origin):
    return origin.made is not None and origin.made.is_layer


def _kept(op, operand, shape):
    if operand is UNKNOWN:
        return UNKNOWN
    made = operand.made
    if _is_layer(operand) and op_kind(op) in _CUTS:
        n_out, before = made.n_out, operand.shape
        whole = n_out in shape and (before[1:2] == shape[1:2] == (n_out,) or shape.count(n_out) >= before.count(n_out))
        made = made if whole else Producer(op)
    elif op_kind(op) in _VIEWS and _is_layer(operand) and _unfolds_images(operand, shape):
        made = made._replace(n_in=made.n_in // shape[0], n_out=made.n_out // shape[0])
    return operand._replace(made=made, shape=shape, size=_size_before(operand.size, shape))


def _unfolds_images(convolution, shape):
    """Whether a view of ``shape`` gives each image the channels that a convolution in groups computed for it.

    So do timm's CondConv2d and StyleGAN's convolutions, in which each image has weights of its own.
    """
    before, n_out = convolution.shape, convolution.made.n_out
    folded = sorted(before[:2]) == [1, n_out] and before[2:] == shape[2:]
    return folded and shape[0] > 1 and shape[0] * shape[1] == n_out and convolution.conv_groups % shape[0] == 0


def _size_before(size, shape):
    """``size``, if repeating single values turns it into ``shape``, else ``shape``."""
    repeated = len(size) <= len(shape) and all(s in (1, t) for s, t in zip(reversed(size), reversed(shape)))
    return size if repeated else shape


def _product(op, operands, shape, value):
    """The product of two matrices. It is a layer if one matrix is more certainly made of parameters than the other."""
    *added, left, right = operands
    if left.parameters == right.parameters == 2:
        return Origin(Producer(op), shape, shape, parameters=1, value=value)
    if right.parameters and right.parameters >= left.parameters:
        made = layer_output(op, right.shape[-2:], right, lambda: left, shape, value)
    elif left.parameters == 2 or (left.parameters and right is not UNKNOWN):
        made = layer_output(op, left.shape[:-3:-1], left, lambda: right, shape, value)
    elif left is UNKNOWN or right is UNKNOWN or _UNSEEN in _layers((left, right)):  # one of them may be a frozen weight
        made = unseen((left, right), shape, value)
    else:
        made = Origin(Producer(op), shape, shape, _layers((left, right)), value=value)
    return _combined("add", [made, *added], shape, value) if _layers(added) else made


def _combined(op, operands, shape, value):
    """A sum, product or choice. It keeps the origin of a layer's output if the other operands do not count."""
    counted = [o for o in operands if o.layers and _is_full(o.size, shape)]
    hidden = any(o.made is None and not o.layers for o in operands)
    if not counted:
        known = [o for o in operands if o is not UNKNOWN]
        value = known[0].value if len(known) == 1 else value
        made = None if hidden else Producer(op)
        return Origin(made, shape, shape, _layers(known), _parameters(operands, shape), value)
    if len(counted) == 1 and not _is_layer(counted[0]):
        return counted[0]._replace(shape=shape, size=shape)
    layers, able = _layers(counted), [o for o in counted if _is_layer(o)]
    if op_kind(op) in _OF_FIRST:
        able = [o for o in able if o is operands[0]]
    kept = next((o for o in able if all(p.layers == o.layers or _is_adapter(p, o) for p in counted)), None)
    if kept is None:
        cannot_tell = _UNSEEN in layers or any(o.made is None for o in counted)
        return Origin(None if cannot_tell else Producer(op), shape, shape, layers, value=value)
    if hidden and op_kind(op) in _SUMS and _is_adapter(kept):  # it may be the adapter of a frozen layer
        return Origin(None, shape, shape, layers, value=value)
    return kept._replace(shape=shape, size=shape, value=kept.value if len(counted) == 1 else value)


def _is_full(size, shape):
    """Whether it has a number of its own for each channel and position."""
    return ((1,) * (len(shape) - len(size)) + size)[1:] == shape[1:]


def _is_adapter(added, layer=None):
    """Whether ``added`` is made from the input of ``layer`` by just two weight layers, the first a bottleneck."""
    down = added.source() if _is_layer(added) else UNKNOWN
    if not _is_layer(down) or down.made.n_out >= min(down.made.n_in, added.made.n_out):
        return False
    if layer is None:
        return True
    return down.source().value == layer.source().value and down.made.n_in == layer.made.n_in
