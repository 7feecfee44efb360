"""Turn the norms of an existing model into ours, in place."""

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from gng_d2.errors import InputError, abbreviated
from gng_d2.groups import practical_num_groups
from gng_d2.layers.class_change import has, original_class
from gng_d2.layers.group_norm import GroupNorm, PracticalGroupNorm
from gng_d2.layers.group_norm_act import GroupNormAct, PracticalGroupNormAct
from gng_d2.layers.kinds import NO_LAYER, num_channels
from gng_d2.layers.norm_names import OURS, norm_from_name, norm_name, unknown_norm
from gng_d2.layers.ws_conv import WS, Conv2d, WSConv2d, unstandardize

from .bind_norms import bind_to_producers
from .calibrate_norms import convert_and_calibrate
from .norm_places import NUMBERS_IN_A_GROUP, Place, find_places

__all__ = ["convert_norms"]

_log = logging.getLogger(__name__)

# Library and class of norms whose forward is a normalization with an affine, and at most their own drop and act.
# FrozenBatchNorm2d is copied from project to project, always with the same formula.
_REPLACED = {
    *("torch._BatchNorm", "torch.SyncBatchNorm", "torch.GroupNorm", "gng_d2.GroupNorm", "gng_d2._WithActivation"),
    *("FrozenBatchNorm2d", "detectron2.NaiveSyncBatchNorm", "timm.GroupNorm", "timm.GroupNorm1"),
    *("timm.BatchNormAct2d", "timm.SyncBatchNormAct", "timm.FrozenBatchNormAct2d"),
    *("timm.GroupNormAct", "timm.GroupNorm1Act"),
}


def convert_norms(
    model: nn.Module, norm: str = "PGN", example_inputs: Any = None, *, calibrate: Any = None
) -> nn.Module:
    """``model`` with its batch norms and group norms turned into the norm of that name, in place.

    It is for models whose norms cannot be chosen by name: those of torchvision, timm,
    segmentation_models_pytorch, or your own. Each norm is changed in place, as PyTorch's lazy modules are: a
    norm used in two places stays one norm, parameters stay the same objects (so device, dtype,
    ``requires_grad`` and an optimizer made before stay), and so do eps, mode, hooks, and the activation and
    dropout inside timm's norms. Affine weights are kept where they mean the same: those of a group norm, and
    those that are all 0 (a block that begins as its shortcut). Any other affine begins at weight 1 and bias 0,
    and where it was a buffer (FrozenBatchNorm) it trains if the weight layer does. Layer norms, instance
    norms, and norms whose class has another forward are left as they are. One line of the log says what became
    of each norm.

    Args:
        model: any model. Convert it before it is wrapped (DDP), compiled, or copied (EMA).
        norm: a name of ours: ``PGN``, ``GN``, ``GN<k>``, ``GN/<c>``, or one of them with ``+WS``. A layer that
            cannot be standardized (anything but a plain Conv2d) keeps its weight, and is listed.
        example_inputs: what :func:`~gng_d2.bind_norms` takes: the model is run on it once, without gradients,
            and each norm learns its weight layer from the tensor that reaches it. A norm that no single layer
            feeds (after a concatenation, a sum, a pooling) then takes its own width as n_in, so 1 group in
            PGN, and is listed. One behind a global pooling, whose groups would hold fewer than 16 numbers, takes
            the most groups that hold 16, or one, so that the model can train on a single image; it is listed
            with both counts. One on a 2-d input is left.
            None: each norm takes the layer that is registered right before it. A PGN that finds none has no
            groups until :func:`~gng_d2.bind_norms` or its first training step gives them, and is listed.
        calibrate: images for :func:`~gng_d2.calibrate_norms`, which then follows: the new norms get the affines with
            which they replace the old ones. For this a model with trained weights is copied.

    Returns:
        ``model``; a second conversion to the same name changes nothing.

    Raises:
        InputError: the name is none of ours, its number of groups does not divide a norm's width, or the model
            cannot be calibrated. The model is then unchanged.

    Examples::
        >>> model = nn.Sequential(nn.Conv2d(64, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        >>> convert_norms(model)[1].num_groups
        8
    """
    if not isinstance(norm, str):
        raise InputError(f"convert_norms(model, norm, example_inputs): norm is a name, not {type(norm).__name__}")
    if norm_from_name(norm) is None:
        raise unknown_norm(norm, OURS)
    if calibrate is not None:
        return convert_and_calibrate(partial(convert_norms, norm=norm, example_inputs=example_inputs), model, calibrate)
    changes, left, already = _plan(model, norm, find_places(model, example_inputs))
    for change in changes:
        change.make()
    _report(norm, already, changes, left, example_inputs is not None)
    return model


def _plan(model, norm, places):
    """The changes to make; why other norms are left, by their names; and how many norms need no change."""
    changes: list[_Change] = []
    left: dict[str, str] = {}
    already = 0
    for name, old in model.named_modules():
        if old not in places or name.startswith(tuple(f"{other}." for other in left)):
            continue
        found = places[old]
        why = _cannot_be_replaced(old, found)
        change = None if why else _change(name, norm, old, found)
        why = why or change.obstacle()
        if why:
            left[name] = why
        elif change.is_made():
            already += 1
        else:
            changes.append(change)
    return changes, left, already


def _cannot_be_replaced(old, found):
    kind = type(old).__name__
    owner = next(cls for cls in type(old).__mro__ if "forward" in vars(cls))
    if not {f"{owner.__module__.partition('.')[0]}.{owner.__name__}", owner.__name__} & _REPLACED:
        return kind
    affine = {**old._parameters, **old._buffers}
    if any(name not in affine or is_lazy(affine[name]) for name in ("weight", "bias")):
        return f"{kind} whose weight is computed or not made yet"
    if found.shapes:
        flat = any(len(shape) == 2 for shape in found.shapes)
    else:
        flat = isinstance(old, nn.BatchNorm1d) and any(isinstance(p.layer, nn.Linear) for p in found.producers or [])
    return f"{kind} on a 2-d input{_no_batch_of_one(old)}" if flat else None


def _no_batch_of_one(old):
    return ", which cannot train on a batch of one" * isinstance(old, _BatchNorm)


def _change(name, norm, old, found):
    """What ``old`` becomes: a norm without an affine, because ``old`` keeps its own."""
    width, base = num_channels(old), norm.removesuffix(WS)
    options = {"eps": old.eps, "affine": False}
    if base == "PGN":
        options["gain_ratio"] = getattr(old, "gain_ratio", 1.0)
    if norm != base and _can_be_standardized(found):
        base = norm
    new = norm_from_name(base)(width, **options)
    if new.num_groups and width % new.num_groups:
        raise InputError(
            f"convert_norms: {norm} cannot replace {name}: its {width} channels do not divide into "
            f"{new.num_groups} groups. Choose PGN, or GN/<c> (c channels in each group), which divide any width"
        )
    groups = new.num_groups
    if groups is None and found.producers is not None:
        n_in = found.producers[0].n_in if found.producers else width
        groups = practical_num_groups(n_in, width, new.gain_ratio)
    change = _Change(name, old, new, groups, found)
    if found.is_pooled:
        change.make_groups_larger()
    return change


def _can_be_standardized(found):
    if found.producers is None:  # bind_norms may find the layer later
        return True
    kinds = [original_class(producer.layer) for producer in found.producers]
    return bool(kinds) and all(kind in (nn.Conv2d, Conv2d, WSConv2d) for kind in kinds)


@dataclass
class _Change:
    """A norm that becomes another."""

    name: str
    old: nn.Module
    new: GroupNorm
    groups: int | None  # those of the norm's name, for an input of any size; None: not known yet
    found: Place

    def __post_init__(self):
        self.is_fresh = not isinstance(self.old, nn.GroupNorm)
        self.had_ws = getattr(self.old, "weight_standardization", False)
        known = isinstance(self.old, GroupNorm) and self.old.in_channels is not None
        self.was_seen = bool(self.found.shapes) or (known and not self.old.follows_registration)

    def numbers_in_a_group(self):
        groups = self.new.num_groups or self.groups
        return self.new.num_channels // groups * math.prod(self.found.size) if groups and self.found.size else math.inf

    def make_groups_larger(self):
        """Behind a global pooling: take fewer groups, until each holds enough numbers or only one is left."""
        width, new = self.new.num_channels, self.new
        if self.groups and self.numbers_in_a_group() < NUMBERS_IN_A_GROUP:
            most = max(width * math.prod(self.found.size) // NUMBERS_IN_A_GROUP, 1)
            fewer = max(divisor for divisor in range(1, most + 1) if width % divisor == 0)
            if fewer < self.groups:
                ws = new.weight_standardization
                self.new = GroupNorm(fewer, width, new.eps, affine=False, weight_standardization=ws)
        self.new.pooled_to = self.found.size

    def shape(self):
        return f"({', '.join(map(str, ('N', self.new.num_channels, *self.found.size)))})"

    def obstacle(self):
        """Why the norm is left: the result of normalizing a single number does not depend on the input."""
        if self.numbers_in_a_group() > 1:
            return None
        why = f"{type(self.old).__name__} on an input {self.shape()} with one number in each group"
        return why + _no_batch_of_one(self.old) + f": {_TRAINING_SIZE}" * (not self.found.is_pooled)

    def is_made(self):
        """Whether ``old`` is that norm already and is bound, and no other layer was seen to feed it."""
        old, new = self.old, self.new
        if not isinstance(old, GroupNorm) or norm_name(old) != norm_name(new) or old.in_channels is None:
            return False
        seen = (self.found.shapes and old.weight_layer is not None and self.found.producers) or []
        return old.pooled_to == new.pooled_to and all(producer.n_in == old.in_channels for producer in seen)

    def make(self):
        """Turn the module that stands in the model into the new norm, and introduce it to its layer."""
        norm, layers = self.old, [producer.layer for producer in self.found.producers or [] if producer.layer]
        state = dict(vars(norm))
        affine = {key: state["_parameters"].get(key, state["_buffers"].get(key)) for key in ("weight", "bias")}
        if self.is_fresh:
            _begin_anew(*affine.values())
        trains = not layers or any(p.requires_grad for layer in layers for p in layer.parameters())
        for key, tensor in affine.items():
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                affine[key] = nn.Parameter(tensor, requires_grad=trains)
        cls = type(self.new)
        if {"drop", "act"} <= norm._modules.keys():
            cls = PracticalGroupNormAct if cls is PracticalGroupNorm else GroupNormAct
        vars(norm).clear()
        vars(norm).update({**vars(self.new), **{key: state[key] for key in vars(nn.Module())}})
        norm.__class__ = cls
        norm._parameters, norm._buffers, norm._non_persistent_buffers_set = affine, {}, set()
        norm.affine = affine["weight"] is not None
        if self.had_ws and not norm.weight_standardization:
            for layer in filter(lambda layer: has(layer, WSConv2d), layers):
                unstandardize(layer)
        if self.found.producers is not None:
            bind_to_producers(norm, self.found.producers)
            norm.follows_registration = not self.was_seen


def _begin_anew(weight, bias):
    if weight is not None and (weight.is_meta or weight.any()):
        with torch.no_grad():
            weight.fill_(1)
            if bias is not None:
                bias.zero_()


_TRAINING_SIZE = "give example_inputs of the size that you train on"


def _report(norm, already, changes, left, has_run):
    """Log one line that says what became of each norm."""
    fresh = sum(change.is_fresh for change in changes)
    became = [(change.name, change.old) for change in changes]
    listed = {
        f"follow {NO_LAYER}, so n_in is their own width": [n for n, m in became if m.weight_layer == NO_LAYER],
        "were not reached by example_inputs and follow the layer registered before them": [
            change.name for change in changes if has_run and change.found.producers and not change.found.shapes
        ],
        "have no groups until bind_norms or a training step": [n for n, m in became if not m.is_bound()],
        "follow a layer that cannot be standardized": [
            n for n, m in became if norm.endswith(WS) and not m.weight_standardization
        ],
        f"follow a global pooling and have fewer groups, to hold {NUMBERS_IN_A_GROUP} numbers in each": [
            f"{c.name}: {c.shape()}, {c.groups} to {c.new.num_groups} groups"
            for c in changes
            if c.new.num_groups not in (None, c.groups)
        ],
        f"have fewer than {NUMBERS_IN_A_GROUP} numbers in a group: {_TRAINING_SIZE}": [
            c.name for c in changes if c.numbers_in_a_group() < NUMBERS_IN_A_GROUP and not c.found.is_pooled
        ],
    }
    for name, why in left.items():
        listed.setdefault(f"are left: {why}", []).append(name)
    said = [f"{len(changes)} norms are {norm} now, {fresh} of them with a fresh affine (weight 1, bias 0)"]
    said += [f"{already} were before"] * bool(already)
    said += [f"{len(names)} {what} ({abbreviated(names, most=12)})" for what, names in listed.items() if names]
    _log.log(
        logging.INFO if already and not changes and not left else logging.WARNING,
        "convert_norms: %s",
        "; ".join(said),
    )
