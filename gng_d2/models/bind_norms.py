"""Bind each norm of a model to the layer that makes its input when the model runs."""

import logging
from contextlib import contextmanager
from typing import Any

from torch import nn

from gng_d2.errors import InputError
from gng_d2.groups import practical_num_groups
from gng_d2.layers.binding import has_given_in_channels, named_norms, unbound_norms
from gng_d2.layers.class_change import has
from gng_d2.layers.group_norm import GroupNorm
from gng_d2.layers.kinds import NO_LAYER
from gng_d2.layers.producers import find_producers
from gng_d2.layers.ws_conv import WSConv2d, check_standardizable, standardize, unstandardize


def bind_norms(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Bind each norm of ours in ``model`` to the layer that makes its input when the model runs, and return ``model``.

    Registration only sees the order in which a model was built. This runs the model, so any code will do. Call it
    before an EMA or DDP is made. What counts as a layer's output is in docs/which-layer.md. A norm that no
    single weight layer feeds (after a residual sum, a concatenation, a pooling, an activation, on the model's input)
    takes its own width as its input channels, so that PGN has one group there; its weight layer is "no single weight
    layer" in its repr and in :func:`gng_d2.norm_table`. A norm whose layer cannot be found (behind a function in NumPy)
    is unbound if only the order of registration had bound it. Norms whose ``in_channels`` were given keep them, and
    norms that the run does not reach stay as they are (:func:`unbound_norms`). A warning in the log names each norm
    whose number of groups changes.

    The model runs once, in eval mode and without gradients, on its own device, also on meta. Its weights, buffers and
    modes and the random number generators are restored afterwards.

    Args:
        example_inputs: what the model is called with. A tuple holds positional arguments, a dict keyword arguments;
            anything else (a tensor, Detectron2's list of dicts) is the only argument. A loader's (images, labels) will
            do if the model takes the images alone.

    Raises:
        InputError: the model cannot be run with them, a norm follows several layers that would give it different
            groups (one that :func:`convert_norms` has converted keeps its single group), or a layer cannot be
            standardized. Then no norm is bound.

    Examples::
        >>> model = nn.Sequential(nn.Conv2d(64, 16, 1), nn.Dropout(), PracticalGroupNorm(16))
        >>> bind_norms(model, torch.ones(1, 64, 8, 8))[2].num_groups
        16
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, GroupNorm)}
    norms = [norm for norm in names if not has_given_in_channels(norm)]
    before = {norm: norm.num_groups for norm in norms}
    with runnable(norms):
        found = find_producers(model, norms, example_inputs)
    layers = {norm: _layers(norm, names[norm], made) for norm, made in found.items() if None not in made}
    hidden = [norm for norm in found if norm not in layers and norm.follows_registration]
    _give_back_weights(model, [*layers, *hidden], [made.layer for producers in layers.values() for made in producers])
    for norm, producers in layers.items():
        bind_to_producers(norm, producers)
    for norm in hidden:
        norm.unbind()
    without = [names[norm] for norm, producers in layers.items() if not producers]
    unbound = unbound_norms(model)
    log = logging.getLogger(__name__)
    log.info(
        f"{len(layers) - len(without)} norms are bound to the layers that make their inputs; {len(without)} follow "
        f"{NO_LAYER} ({', '.join(without) or '-'}); {len(unbound)} stay unbound ({', '.join(unbound) or '-'})"
    )
    changed = [
        f"{names[norm]}: {groups} -> {norm.num_groups or 'none, because its layer cannot be found'}"
        for norm, groups in before.items()
        if groups not in (None, norm.num_groups)
    ]
    if changed:
        log.warning(f"bind_norms changed the number of groups of {len(changed)} norms: {', '.join(changed)}")
    return model


@contextmanager
def runnable(norms):
    """A context in which all ``norms`` have one group, so that each of them can run."""
    kept = {norm: (norm.num_groups, norm.weight_layer) for norm in norms}
    for norm in kept:
        norm.num_groups, norm.weight_layer = 1, norm.weight_layer or NO_LAYER
    try:
        yield
    finally:
        for norm, (num_groups, weight_layer) in kept.items():
            norm.num_groups, norm.weight_layer = num_groups, weight_layer


def _layers(norm, name, producers):
    """The weight layers that made the inputs of ``norm``; an empty list if something else made one of them."""
    layers = [made for made in dict.fromkeys(producers) if made.n_out == norm.num_channels]
    others = [made.op for made in producers if made.n_out != norm.num_channels]
    depends_on = {made.n_in for made in layers} | {norm.num_channels for _ in others}
    if norm.weight_standardization and layers and others:
        depends_on.add(NO_LAYER)
    elif not norm.weight_standardization and hasattr(norm, "gain_ratio"):
        depends_on = {practical_num_groups(n_in, norm.num_channels, norm.gain_ratio) for n_in in depends_on}
    if norm.needs_layer() and len(depends_on) > 1:
        if norm.weight_layer == NO_LAYER:  # convert_norms found the same
            return []
        made_by = ", ".join([*map(str, layers), *dict.fromkeys(others)])
        raise InputError(
            f"{name}: this {norm.norm_name()} is used in several places, with inputs made by {made_by}. Give each "
            f"place a norm of its own"
        )
    if others:
        return []
    for made in layers if norm.weight_standardization else ():
        check_standardizable(made.layer, norm.norm_name())
    return layers


def bind_to_producers(norm, producers):
    if not producers:
        norm.bind(norm.num_channels, NO_LAYER)
    for made in producers:
        norm.bind(made.n_in, str(made))
        if norm.weight_standardization:
            standardize(made.layer, norm.norm_name())


def _give_back_weights(model, norms, layers):
    """Make convolutions plain again that were standardized for ``norms`` but are not among ``layers``."""
    norms = {norm for norm in norms if norm.weight_standardization}
    standardized = {layer for _, norm, _, layer in named_norms(model) if norm in norms}
    for layer in standardized - set(layers):
        if has(layer, WSConv2d):
            unstandardize(layer)
