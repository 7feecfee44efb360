"""Turn the norms of an existing model into ours, in place."""

import copy
import logging
import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from gng_d2.errors import InputError, abbreviated, one_line
from gng_d2.layers.class_change import check_changeable, has
from gng_d2.layers.group_norm import GroupNorm, PracticalGroupNorm
from gng_d2.layers.group_norm_act import WITH_ACTIVATION
from gng_d2.layers.kinds import NO_LAYER, num_channels
from gng_d2.layers.learned_group_norm import LearnedGroupNorm
from gng_d2.layers.norm_names import OURS, norm_from_name, norm_name, unknown_norm
from gng_d2.layers.ws_conv import WS, WSConv2d, can_be_standardized, unstandardize

from .bind_norms import bind_to_producers
from .calibrate_norms import calibrate_norms
from .norm_places import NUMBERS_IN_A_GROUP, find_places

# Library and class of norms whose forward is a normalization with an affine, and at most their own drop and act.
# FrozenBatchNorm2d is copied from project to project, always with the same formula.
_REPLACED = {
    *("torch._BatchNorm", "torch.SyncBatchNorm", "torch.GroupNorm", "gng_d2.GroupNorm", "gng_d2._WithActivation"),
    *("FrozenBatchNorm2d", "detectron2.NaiveSyncBatchNorm", "timm.GroupNorm", "timm.GroupNorm1"),
    *("timm.BatchNormAct2d", "timm.SyncBatchNormAct", "timm.FrozenBatchNormAct2d"),
    *("timm.GroupNormAct", "timm.GroupNorm1Act"),
}


_ATTRIBUTES = frozenset(dir(PracticalGroupNorm(1)))  # of a norm of ours


def convert_norms(
    model: nn.Module, norm: str = "PGN", example_inputs: Any = None, *, calibrate: Any = None
) -> nn.Module:
    """``model`` with its batch norms and group norms turned into the norm of that name, in place.

    It is for models whose norms cannot be chosen by name: those of torchvision, timm, segmentation_models_pytorch, or
    your own. Each norm is changed in place, as PyTorch's lazy modules are. A norm used in two places stays one norm,
    and parameters stay the same objects, with their device, dtype and ``requires_grad``, so that an optimizer made
    before stays valid; LGN has new ones, ``logits``, which it does not know. Its eps, mode, hooks, and timm's
    activation and dropout stay too. Affine weights are kept where they mean the same: those of a group norm, and those
    that are all 0 (a block that begins as its shortcut). Any other affine begins at weight 1 and bias 0. Where it was a
    buffer (FrozenBatchNorm), it trains if the weight layer does. Layer norms, instance norms, and norms whose class has
    another forward are left as they are. One line of the log says what became of each norm.

    Args:
        model: any model. Convert it before it is wrapped (DDP), compiled, or copied (EMA).
        norm: a name of ours: ``PGN``, ``LGN``, ``GN``, ``GN<k>``, ``GN/<c>``, or one of them with ``+WS``. A layer that
            cannot be standardized (anything but a plain Conv2d) keeps its weight, and is listed.
        example_inputs: what :func:`~gng_d2.bind_norms` takes: the model is run on it once, without gradients, and each
            norm learns its weight layer from the tensor that reaches it. A norm that no single layer feeds (after a
            concatenation, a sum, a pooling) takes its own width as n_in, so 1 group in PGN, and is listed. A norm
            behind a global pooling, whose groups would hold fewer than 16 numbers, takes the most groups that hold 16,
            or one, so that the model can train on a single image; it is listed with both counts. A norm on a 2-d input
            is left. With None each norm takes the layer that is registered right before it. A PGN that finds none has
            no groups until :func:`~gng_d2.bind_norms` or its first training step gives them, and is listed.
        calibrate: images for :func:`~gng_d2.calibrate_norms`, which then gives the new norms the affines with which
            they replace the old ones. For this a model with trained weights is copied.

    Returns:
        ``model``; a second conversion to the same name changes nothing.

    Raises:
        InputError: the name is none of ours, its number of groups does not divide a norm's width, a convolution that
            has to lose its weight standardization is not known, or the model cannot be calibrated. The model is then
            unchanged.

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
        calibrated = _copied(model)  # because the calibration may fail
        if _convert(calibrated, norm, example_inputs, "calibrated")[0]:
            calibrate_norms(calibrated, model, calibrate)
    affine = "weight 1, bias 0" if calibrate is None else "calibrated"
    number, level, said = _convert(model, norm, example_inputs, affine)
    logging.getLogger(__name__).log(level, said)
    if calibrate is not None and number == 0:
        logging.getLogger(__name__).warning("convert_norms: nothing is calibrated, because no norm was converted")
    elif calibrate is not None:
        for made, its_copy in zip(model.modules(), calibrated.modules()):
            if isinstance(made, nn.GroupNorm):
                made.calibration_error = its_copy.calibration_error
                with torch.no_grad():
                    for parameter, value in zip(made.parameters(), its_copy.parameters()):
                        parameter.copy_(value)
    return model


def _copied(model):
    try:
        return copy.deepcopy(model)
    except Exception as error:  # of a tensor that a forward has kept, say, or of the user's classes
        raise InputError(
            f"convert_norms(calibrate=...) needs a copy of the model, which cannot be made: {one_line(error)}"
        ) from error


def _convert(model, norm, example_inputs, affine):
    """Change the norms. Returns how many, and the level and the text of what the log says; ``affine``: what it says of
    a new one."""
    places = find_places(model, example_inputs)
    changes: list[_Change] = []
    left: dict[str, str] = {}  # why other norms are left, by their names
    already = 0
    for name, old in model.named_modules():
        if old not in places or name.startswith(tuple(f"{other}." for other in left)):
            continue
        why = _cannot_be_replaced(old, places[old])
        if not why:
            change = _Change(name, norm, old, places[old])
            why = change.obstacle()
        if why:
            left[name] = why
        elif change.is_made():
            already += 1
        else:
            changes.append(change)
    for change in changes:
        change.make()
    made = {change.old for change in changes if change.is_fresh}
    for module in model.modules():
        # norms of Detectron2's heads that take turns, and have one affine for all
        if type(module).__name__ == "CycleBatchNormList" and made.issuperset(module):
            _begin_anew(module.weight, module.bias)
    return len(changes), *_report(norm, already, changes, left, example_inputs is not None, affine)


def _cannot_be_replaced(old, place):
    kind = type(old).__name__
    owner = next(cls for cls in type(old).__mro__ if "forward" in vars(cls))
    if not {f"{owner.__module__.partition('.')[0]}.{owner.__name__}", owner.__name__} & _REPLACED:
        return kind
    if "forward" in vars(old):
        return f"{kind} whose forward was replaced"
    affine = {**old._parameters, **old._buffers}
    if any(name not in affine or is_lazy(affine[name]) for name in ("weight", "bias")):
        return f"{kind} whose weight is computed or not made yet"
    if place.shapes:
        flat = any(len(shape) == 2 for shape in place.shapes)
    else:
        flat = isinstance(old, nn.BatchNorm1d) and any(isinstance(p.layer, nn.Linear) for p in place.producers or [])
    return f"{kind} on a 2-d input{_no_batch_of_one(old)}" if flat else None


def _no_batch_of_one(old):
    return ", which cannot train on a batch of one" * isinstance(old, _BatchNorm)


class _Change:
    """A norm that becomes another.

    ``new`` has no affine, because ``old`` keeps its own. ``groups`` is the number of groups that the norm's name gives
    for inputs of any size, or None if it is not known yet.
    """

    def __init__(self, name, norm, old, place):
        self.name, self.old, self.place = name, old, place
        self.is_fresh = not isinstance(old, nn.GroupNorm)
        width = num_channels(old)
        eps = getattr(old, "eps", 1e-5)  # DETR's FrozenBatchNorm2d has none
        options = {"gain_ratio": getattr(old, "gain_ratio", 1.0)} if norm.removesuffix(WS) == "PGN" else {}
        made = norm_from_name(norm if self._can_be_standardized() else norm.removesuffix(WS))
        numbers = [*old._parameters.values(), *old._buffers.values()]
        like = next((t for t in numbers if t is not None and t.is_floating_point()), torch.empty(0, device="cpu"))
        self.new = made(width, eps=eps, affine=False, device=like.device, dtype=like.dtype, **options)
        self.groups = self.new.num_groups
        if self.groups and width % self.groups:
            raise InputError(
                f"convert_norms: {norm} cannot replace {name}: its {width} channels do not divide into {self.groups} "
                f"groups. Choose PGN, or GN/<c> (c channels in each group), which divide any width"
            )
        lost = getattr(old, "weight_standardization", False) and not self.new.weight_standardization
        if (
            lost
            and old.weight_layer not in (None, NO_LAYER)
            and not any(producer.layer for producer in place.producers or ())
        ):
            raise InputError(
                f"convert_norms: {name} has weight standardization, and {norm} has none. Which convolution has to lose "
                f"it is seen only when the model runs: give example_inputs that reach it"
            )
        for producer in place.producers or () if lost else ():
            if producer.layer:
                check_changeable(producer.layer)
        if self.groups is None and place.producers is not None:
            n_in = place.producers[0].n_in if place.producers else width
            self.groups = self.new.groups_after(n_in)
        if place.is_pooled:
            if self.groups and self.numbers_in_a_group() < NUMBERS_IN_A_GROUP:
                most = max(width * math.prod(place.size) // NUMBERS_IN_A_GROUP, 1)
                fewer = max(divisor for divisor in range(1, most + 1) if width % divisor == 0)
                if fewer < self.groups:
                    ws = self.new.weight_standardization
                    self.new = GroupNorm(fewer, width, eps, affine=False, weight_standardization=ws)
            self.new.pooled_to = place.size

    def _can_be_standardized(self):
        if self.place.producers is None:  # bind_norms may find the layer later
            return True
        layers = [producer.layer for producer in self.place.producers]
        return bool(layers) and all(map(can_be_standardized, layers))

    def numbers_in_a_group(self):
        groups = 1 if isinstance(self.new, LearnedGroupNorm) else self.new.num_groups or self.groups
        size = self.place.size
        return self.new.num_channels // groups * math.prod(size) if groups and size else math.inf

    def shape(self):
        return f"({', '.join(map(str, ('N', self.new.num_channels, *self.place.size)))})"

    def obstacle(self):
        """Why the norm is left: the result of normalizing a single number does not depend on the input."""
        if self.numbers_in_a_group() > 1:
            return None
        why = f"{type(self.old).__name__} on an input {self.shape()} with one number in each group"
        return why + _no_batch_of_one(self.old) + f": {_TRAINING_SIZE}" * (not self.place.is_pooled)

    def is_made(self):
        """Whether ``old`` is that norm already and is bound, and no other layer was seen to feed it."""
        old, new = self.old, self.new
        if not isinstance(old, GroupNorm) or norm_name(old) != norm_name(new) or old.in_channels is None:
            return False
        seen = (self.place.shapes and old.weight_layer is not None and self.place.producers) or []
        return old.pooled_to == new.pooled_to and all(producer.n_in == old.in_channels for producer in seen)

    def make(self):
        """Turn the module that stands in the model into the new norm, and introduce it to its layer."""
        norm, producers = self.old, self.place.producers
        layers = [producer.layer for producer in producers or [] if producer.layer]
        had_ws = getattr(norm, "weight_standardization", False)
        known = isinstance(norm, GroupNorm) and norm.in_channels is not None
        was_seen = self.place.shapes or (known and not norm.follows_registration)
        state = dict(vars(norm))
        affine = {key: state["_parameters"].get(key, state["_buffers"].get(key)) for key in ("weight", "bias")}
        if self.is_fresh:
            _begin_anew(*affine.values())
        trains = not layers or any(p.requires_grad for layer in layers for p in layer.parameters())
        own_trains = (
            state["_parameters"]["weight"].requires_grad if state["_parameters"].get("weight") is not None else trains
        )
        own = {
            key: state["_parameters"].get(key, parameter.requires_grad_(own_trains))
            for key, parameter in self.new._parameters.items()
            if key not in affine
        }
        for key, tensor in affine.items():
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                affine[key] = nn.Parameter(tensor, requires_grad=trains)
        cls = type(self.new)
        if "act" in norm._modules:
            state["_modules"].setdefault("drop", nn.Identity())  # timm has it since 0.6
            cls = WITH_ACTIVATION[cls]
        vars(norm).clear()
        # the model may read attributes such as a batch norm's num_features
        kept = {key: value for key, value in state.items() if key not in _ATTRIBUTES or key in vars(nn.Module())}
        vars(norm).update({**vars(self.new), **kept})
        norm.__class__ = cls
        norm._parameters, norm._buffers, norm._non_persistent_buffers_set = {**affine, **own}, {}, set()
        norm.affine = affine["weight"] is not None
        if had_ws and not norm.weight_standardization:
            for layer in filter(lambda layer: has(layer, WSConv2d), layers):
                unstandardize(layer)
        if producers is not None:
            bind_to_producers(norm, producers)
            norm.follows_registration = not was_seen


def _begin_anew(weight, bias):
    if weight is not None and (weight.is_meta or weight.any()):
        with torch.no_grad():
            weight.fill_(1)
            if bias is not None:
                bias.zero_()


_TRAINING_SIZE = "give example_inputs of the size that you train on"


def _report(norm, already, changes, left, has_run, affine):
    """The level and the text of the line that says what became of each norm."""
    fresh = sum(change.is_fresh for change in changes)
    became = [(change.name, change.old) for change in changes]
    listed = {
        f"follow {NO_LAYER}, so n_in is their own width": [n for n, m in became if m.weight_layer == NO_LAYER],
        "were not reached by example_inputs and follow the layer registered before them": [
            c.name for c in changes if has_run and c.place.producers and not c.place.shapes
        ],
        "have no groups until bind_norms, or a training step that shows their layer": [
            n for n, m in became if not m.is_bound()
        ],
        "follow a layer that cannot be standardized": [
            n for n, m in became if norm.endswith(WS) and not m.weight_standardization
        ],
        f"follow a global pooling and have fewer groups, to hold {NUMBERS_IN_A_GROUP} numbers in each": [
            f"{c.name}: {c.shape()}, {c.groups} to {c.new.num_groups} groups"
            for c in changes
            if c.new.num_groups not in (None, c.groups)
        ],
        f"have fewer than {NUMBERS_IN_A_GROUP} numbers in a group: {_TRAINING_SIZE}": [
            c.name for c in changes if c.numbers_in_a_group() < NUMBERS_IN_A_GROUP and not c.place.is_pooled
        ],
    }
    for name, why in left.items():
        listed.setdefault(f"are left: {why}", []).append(name)
    said = [f"{len(changes)} norms are {norm} now, {fresh} of them with a new affine ({affine})"]
    said += [f"{already} were before"] * bool(already)
    said += [f"{len(names)} {what} ({abbreviated(names, most=12)})" for what, names in listed.items() if names]
    level = logging.INFO if already and not changes and not left else logging.WARNING
    return level, f"convert_norms: {'; '.join(said)}"
