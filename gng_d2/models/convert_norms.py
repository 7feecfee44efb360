"""Group norm in a model that exists: its norms are turned into ours where they stand."""

import logging
import re
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from gng_d2.errors import InputError
from gng_d2.groups import practical_num_groups
from gng_d2.layers.binding import named_norms
from gng_d2.layers.class_change import original_class
from gng_d2.layers.fx_leaf import call_as_leaf
from gng_d2.layers.group_norm import GroupNorm, PracticalGroupNorm
from gng_d2.layers.kinds import NO_LAYER, Producer, layer_shape, num_channels
from gng_d2.layers.norm_names import OURS, norm_from_name, norm_name, unknown_norm
from gng_d2.layers.producers import find_producers
from gng_d2.layers.ws_conv import WS, Conv2d, WSConv2d, unstandardize
from gng_d2.ops import group_norm

from .bind_norms import bind_to_producers, runnable

__all__ = ["convert_norms", "GroupNormAct", "PracticalGroupNormAct"]

_log = logging.getLogger(__name__)

# Whose forward is a normalization with an affine, and nothing else but their own drop and act: library and class.
# FrozenBatchNorm2d is copied from project to project, always with the same formula.
_REPLACED = {
    *("torch._BatchNorm", "torch.SyncBatchNorm", "torch.GroupNorm", "gng_d2.GroupNorm", "gng_d2._WithActivation"),
    *("FrozenBatchNorm2d", "detectron2.NaiveSyncBatchNorm", "timm.GroupNorm", "timm.GroupNorm1"),
    *("timm.BatchNormAct2d", "timm.SyncBatchNormAct", "timm.FrozenBatchNormAct2d"),
    *("timm.GroupNormAct", "timm.GroupNorm1Act"),
}


class _WithActivation:
    """Where timm's norm holds a dropout and an activation, ours holds them too."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # as in GroupNorm, whose forward TorchScript cannot call from here
            if isinstance(input, Proxy):
                return call_as_leaf(self, input)
            self._check(input)
        return self.act(self.drop(group_norm(input, self.num_groups, self.weight, self.bias, self.eps)))


class GroupNormAct(_WithActivation, GroupNorm):
    """:class:`GroupNorm`, then ``drop``, then ``act``, as in timm's GroupNormAct."""


class PracticalGroupNormAct(_WithActivation, PracticalGroupNorm):
    """:class:`PracticalGroupNorm`, then ``drop``, then ``act``, as in timm's GroupNormAct."""


def convert_norms(model: nn.Module, norm: str = "PGN", example_inputs=None) -> nn.Module:
    """``model`` with its batch norms and group norms turned into the norm of that name, in place.

    It is for models that take no norm's name: those of torchvision, timm, segmentation_models_pytorch, or
    one's own. Each norm is changed where it stands, as PyTorch's lazy modules are: a norm in two places stays
    one, parameters stay the same objects (so device, dtype, ``requires_grad`` and an optimizer made before
    stay), and so do eps, mode, hooks, and the activation and dropout inside timm's norms. Affine weights are
    kept where they mean the same: those of a group norm, and those that are all 0 (a block that begins as its
    shortcut). Any other affine begins at weight 1 and bias 0, and where it was a buffer (FrozenBatchNorm) it
    trains if the weight layer does. Layer norms, instance norms, and a norm whose class has a forward of its
    own are left. One line of the log says what became of which norm.

    Args:
        model: any model. Convert it before it is wrapped (DDP), compiled, or copied (EMA).
        norm: a name of ours: ``PGN``, ``GN``, ``GN<k>``, ``GN/<c>``, or one of them with ``+WS``. A layer that
            cannot be standardized (anything but a plain Conv2d) keeps its weight, and is listed.
        example_inputs: what :func:`~gng_d2.bind_norms` takes: the model is run on it once, without gradients,
            and each norm learns its weight layer from the tensor that reaches it. A norm that no single layer
            feeds (after a concatenation, a sum, a pooling) then takes its own width as n_in, so 1 group in
            PGN, and is listed; one on a 2-d input, or whose groups would hold a single number, is left.
            None: each norm takes the layer that is registered right before it. A PGN that finds none has no
            groups until :func:`~gng_d2.bind_norms` or its first training step gives them, and is listed.

    Returns:
        ``model``; a second conversion to the same name changes nothing.

    Raises:
        InputError: the name is none of ours, or its number of groups does not divide a norm's width. The
            model is then as it was.

    Examples::
        >>> model = nn.Sequential(nn.Conv2d(64, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        >>> convert_norms(model)[1].num_groups
        8
    """
    if not isinstance(norm, str):
        raise InputError(f"convert_norms(model, norm, example_inputs): norm is a name, not {type(norm).__name__}")
    if norm_from_name(norm) is None:
        raise unknown_norm(norm, OURS)
    places = _find(model, example_inputs)
    changes: list[_Change] = []
    left: dict[str, str] = {}
    already = 0
    for name, old in model.named_modules():
        if not _is_norm(old) or name.startswith(tuple(f"{other}." for other in left)):
            continue
        found = places.get(old, _Found())
        if _is_it_already(old, norm, found):
            already += 1
            continue
        why = _cannot_be_replaced(old, found)
        if why is None:
            change = _Change(name, old, _new_norm(name, norm, old, found), found)
            why = change.would_hold_single_numbers()
        if why is None:
            changes.append(change)
        else:
            left[name] = why
    for change in changes:
        change.make()
    _report(norm, already, changes, left, example_inputs is not None)
    return model


@dataclass
class _Found:
    """What is known of a norm's place in the model."""

    # the weight layers that feed it, alike in their sizes; empty: no single one does; None: not known
    producers: list[Producer] | None = None
    shapes: list[tuple] = field(default_factory=list)  # of its inputs, where the model was run


def _find(model: nn.Module, example_inputs: Any) -> dict[nn.Module, _Found]:
    """What feeds each norm: seen by running the model, else by the order of registration or the norm's record."""
    found = {}
    registered = defaultdict(list)
    for _, norm, _, layer in named_norms(model):
        registered[norm].append(layer)
    for norm, layers in registered.items():
        if None not in layers and len({layer_shape(layer) for layer in layers}) == 1:
            found[norm] = _Found([Producer(type(layer).__name__, *layer_shape(layer), layer) for layer in layers])
        elif isinstance(norm, GroupNorm) and norm.in_channels is not None:
            op = (norm.weight_layer or "Layer").partition("(")[0]
            none = norm.weight_layer == NO_LAYER
            found[norm] = _Found([] if none else [Producer(op, norm.in_channels, norm.num_channels)])
    if example_inputs is None:
        return found
    norms = [module for module in model.modules() if _is_norm(module)]
    with runnable(norm for norm in norms if isinstance(norm, GroupNorm)), _shapes_of_inputs(norms) as shapes:
        calls = find_producers(model, norms, example_inputs)
    for norm, made in calls.items():
        alike = len({producer and producer[1:3] for producer in made}) == 1
        seen = None if None in made else made if alike and made[0].n_out == num_channels(norm) else []
        found[norm] = _Found(seen and list(dict.fromkeys(seen)), shapes[norm])
    return found


@contextmanager
def _shapes_of_inputs(norms):
    shapes = defaultdict(list)

    def note(norm, args, kwargs):
        shapes[norm].append(tuple((*args, *kwargs.values())[0].shape))

    hooks = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def _is_norm(module):
    """Whether it normalizes, and holds no norm or other module with parameters."""
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return True
    if not re.search("norm|abn", type(module).__name__, re.IGNORECASE):
        return False
    own = next(chain(module.parameters(False), module.buffers(False)), None)
    within = (m for child in module.children() for m in child.modules())
    return own is not None and not any(m._parameters for m in within)


def _is_it_already(old, norm, found):
    """Whether ``old`` is the norm of that name and bound; not by the order of registration, if its layer was seen."""
    if not isinstance(old, GroupNorm) or norm_name(old) != norm or old.in_channels is None:
        return False
    seen = (found.shapes and old.weight_layer is not None and found.producers) or []
    return all(producer.n_in == old.in_channels for producer in seen)


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
    return f"{kind} on a 2-d input" if flat else None


def _new_norm(name, norm, old, found):
    """What ``old`` becomes, without its affine: that of ``old`` stays."""
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
    return new


def _can_be_standardized(found):
    if found.producers is None:  # bind_norms may find it
        return True
    kinds = [original_class(producer.layer) for producer in found.producers]
    return bool(kinds) and all(kind in (nn.Conv2d, Conv2d, WSConv2d) for kind in kinds)


@dataclass
class _Change:
    """One norm that becomes another."""

    name: str
    old: nn.Module
    new: GroupNorm
    found: _Found

    def __post_init__(self):
        self.is_fresh = not isinstance(self.old, nn.GroupNorm)
        self.had_ws = getattr(self.old, "weight_standardization", False)
        known = isinstance(self.old, GroupNorm) and self.old.in_channels is not None
        self.was_seen = bool(self.found.shapes) or (known and not self.old.follows_registration)

    def would_hold_single_numbers(self):
        width, groups = self.new.num_channels, self.new.num_groups
        if groups is None and self.found.producers:
            groups = practical_num_groups(self.found.producers[0].n_in, width, self.new.gain_ratio)
        for shape in self.found.shapes:
            if groups == width and all(size == 1 for size in shape[2:]):
                return f"{type(self.old).__name__} on an input {shape} with one number in each group"
        return None

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
            for layer in filter(lambda layer: original_class(layer) is WSConv2d, layers):
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


def _report(norm, already, changes, left, has_run):
    """One line on what became of which norm."""
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
    }
    for name, why in left.items():
        listed.setdefault(f"are left: {why}", []).append(name)
    said = [f"{len(changes)} norms are {norm} now, {fresh} of them with a fresh affine (weight 1, bias 0)"]
    said += [f"{already} were before"] * bool(already)
    said += [f"{len(names)} {what} ({_some(names)})" for what, names in listed.items() if names]
    _log.log(
        logging.INFO if already and not changes and not left else logging.WARNING,
        "convert_norms: %s",
        "; ".join(said),
    )


def _some(names, most=12):
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)
