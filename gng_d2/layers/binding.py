"""How a norm finds the weight layer that feeds it: when it is registered, or when the model runs.

PyTorch calls a global hook whenever a module becomes a child of another, so a norm meets its layer
while the model is being built, and no class of Detectron2 has to know of it. Where the order in which a model is built
does not tell, :func:`bind_norms` looks what the model does.
"""

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_module_registration_hook

from gng_d2.errors import InputError

from .group_norm import GroupNorm
from .look import NO_LAYER
from .producers import Producer, find_producers
from .recompute import original_class
from .ws_conv import WSConv2d, standardize, unstandardize

__all__ = [
    "bind",
    "bind_norms",
    "bind_to_producers",
    "build_naming_norms",
    "describe",
    "install_binding_hook",
    "layer_shape",
    "named_norms",
    "num_channels",
    "runnable",
    "unbound_norms",
    "weight_layer",
]

# what weight layers call their sizes
_SIZES = (("in_channels", "out_channels"), ("in_features", "out_features"))


def num_channels(module: nn.Module) -> Optional[int]:
    """Channels of a normalization layer (PyTorch's and Detectron2's); None for any other module."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, _NormBase):
        return module.num_features
    if type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d"):  # not every one has num_features
        return module.weight.numel() if isinstance(getattr(module, "weight", None), Tensor) else None
    if type(module).__name__ == "LayerNorm":
        return getattr(module, "normalized_shape", (None,))[-1]
    return None


def layer_shape(module: nn.Module) -> Optional[Tuple[int, int]]:
    """(n_in, n_out) of a weight layer (convolution, transposed, deformable, linear); None for others."""
    return _sizes(module) if isinstance(getattr(module, "weight", None), Tensor) else None


def _sizes(module):
    for names in _SIZES:
        n_in, n_out = (getattr(module, name, None) for name in names)
        if n_in and n_out:
            return n_in, n_out
    return None


def describe(layer: nn.Module) -> str:
    """For instance "Conv2d(256, 128)"."""
    return f"{type(layer).__name__}({', '.join(map(str, _sizes(layer)))})"


def weight_layer(parent: nn.Module, name: str, norm: nn.Module) -> Optional[nn.Module]:
    """The weight layer that feeds ``norm``, where ``norm`` is or becomes the child ``name`` of ``parent``.

    It is ``parent`` itself, as in Detectron2's ``Conv2d``, or the child registered immediately
    before, if that has as many output channels and no norm of its own. Otherwise None: no guess.
    """
    if _feeds(parent, norm):
        return parent
    before = None
    for sibling_name, sibling in parent._modules.items():  # named_children() leaves out repeated ones
        if sibling_name == name:
            break
        before = sibling if sibling is not None else before
    if before is not None and _feeds(before, norm):
        claimed = any(num_channels(child) is not None for child in before.children())
        return None if claimed else before
    # Detectron2's deformable convolutions take their norm before they make their weight.
    unfinished = name == "norm" and before is None and hasattr(parent, "kernel_size")
    return parent if unfinished and (_sizes(parent) or (0, 0))[1] == num_channels(norm) else None


def _feeds(layer, norm):
    shape = layer_shape(layer)
    return shape is not None and shape[1] == num_channels(norm)


def named_norms(model: nn.Module) -> Iterator[Tuple[str, nn.Module, Optional[str], Optional[nn.Module]]]:
    """(name, norm, name of its weight layer, that layer) for each norm of ``model``, in its order.

    The last two are None where no weight layer was found.
    """
    names = {module: name for name, module in model.named_modules()}
    for parent in list(names):
        for name, child in parent.named_children():
            if num_channels(child) is not None:
                layer = weight_layer(parent, name, child)
                if isinstance(child, GroupNorm) and not _agrees(child, layer):
                    layer = None
                yield names[child], child, names.get(layer), layer


def _agrees(norm, layer):
    """Whether ``layer`` can be the one that ``norm`` was bound to, if it was to any."""
    if norm.weight_layer == NO_LAYER:
        return False
    return layer is None or norm.in_channels in (None, _sizes(layer)[0])


def bind(norm: GroupNorm, layer: nn.Module) -> None:
    """Make ``layer`` the weight layer of ``norm``, which takes its groups from it and may standardize its weight.

    Raises:
        InputError: the groups do not divide its output channels, or it cannot be standardized.
    """
    description = describe(layer)
    if norm.weight_standardization:
        standardize(layer, norm.norm_name())
    norm.bind(_sizes(layer)[0], description)


def _bind_on_registration(parent: nn.Module, name: str, child: Optional[nn.Module]) -> None:
    """The hook: binds ``child``, if it is a norm of ours, to its weight layer. If it is a layer that takes
    the place of another, the norm right after it is bound anew."""
    if isinstance(child, GroupNorm):
        child.look_again()
        layer = None if _has_given_in_channels(child) else weight_layer(parent, name, child)
        # A convolution that takes over a bound norm is sure to feed it; what stands before it need not.
        if layer is not None and (layer is parent or child.in_channels is None or not child.needs_layer()):
            _bind_or_defer(child, layer)
    elif parent._modules.get(name) is not None and child is not None:
        names = list(parent._modules)
        after = parent._modules.get(names[names.index(name) + 1]) if name != names[-1] else None
        if isinstance(after, GroupNorm) and not _has_given_in_channels(after) and _feeds(child, after):
            _bind_or_defer(after, child)


def _has_given_in_channels(norm):
    """Whether its in_channels were given, and not taken from a layer."""
    return norm.in_channels is not None and norm.weight_layer is None


# norm -> why it cannot follow its layer, while a model is built that will tell its path
_deferred: ContextVar[Optional[Dict[GroupNorm, InputError]]] = ContextVar("deferred", default=None)


def _bind_or_defer(norm, layer):
    deferred = _deferred.get()
    try:
        bind(norm, layer)
    except InputError as error:
        if deferred is None:
            raise
        deferred[norm] = error
    else:
        (deferred or {}).pop(norm, None)


def build_naming_norms(build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """``build(*args)``, a model. While it is being built a norm has no path, so errors of binding wait for the end.

    Raises:
        InputError: a norm cannot follow its layer; names it by its path.
    """
    deferred: Dict[GroupNorm, InputError] = {}
    token = _deferred.set(deferred)
    try:
        model = build(*args)
    finally:
        _deferred.reset(token)
    failed = [(path, deferred[module]) for path, module in model.named_modules() if module in deferred]
    if failed:
        path, error = failed[0]
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise InputError(f"{path}{more}: {error}") from error
    return model


@cache
def install_binding_hook() -> None:
    """Have PyTorch call us whenever a module becomes a child of another, from the first call on."""
    register_module_module_registration_hook(_bind_on_registration)


def bind_norms(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Bind each norm of ours in ``model`` to the layer that makes its input when the model runs, and return ``model``.

    Registration sees the order in which a model was built; this sees what it does, so any code will do. Call it before
    the optimizer, EMA or DDP is made. A norm that no single weight layer feeds (after a sum, a concatenation, a
    pooling, an activation, on the model's input) takes its own width as its input channels, so that PGN has one group
    there; its weight layer is "no single weight layer" in its repr and in :func:`gng_d2.norm_table`. Norms
    whose ``in_channels`` were given keep them, and norms that the run does not reach stay as they are
    (:func:`unbound_norms`).

    The model runs once, in eval mode and without gradients, on its own device, also on meta. Its weights, buffers and
    modes and the random number generators are afterwards what they were.

    Args:
        example_inputs: what the model is called with. A tuple: its positional arguments; a dict: its keyword arguments;
            anything else (a tensor, Detectron2's list of dicts): its only argument. A loader's (images, labels) will
            do, where the model takes the images alone.

    Raises:
        InputError: the model cannot be run with them, a norm follows several layers with different input channels, or a
            layer cannot be standardized. No norm is bound then.

    Examples::
        >>> model = nn.Sequential(nn.Conv2d(64, 16, 1), nn.Dropout(), PracticalGroupNorm(16))
        >>> bind_norms(model, torch.ones(1, 64, 8, 8))[2].num_groups
        16
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, GroupNorm)}
    norms = [norm for norm in names if not _has_given_in_channels(norm)]
    with runnable(norms):
        found = find_producers(model, norms, example_inputs)
    layers = {norm: _layers(norm, names[norm], made) for norm, made in found.items() if None not in made}
    _give_back_weights(model, layers)
    for norm, producers in layers.items():
        bind_to_producers(norm, producers)
    without = [names[norm] for norm, producers in layers.items() if not producers]
    unbound = unbound_norms(model)
    logging.getLogger(__name__).info(
        f"{len(layers) - len(without)} norms are bound to the layers that make their inputs; {len(without)} follow "
        f"{NO_LAYER} ({', '.join(without) or '-'}); {len(unbound)} stay unbound ({', '.join(unbound) or '-'})"
    )
    return model


def unbound_norms(model: nn.Module) -> List[str]:
    """Names of the norms of ``model`` that cannot run yet, for they have not met the weight layer that they need.

    Examples::
        >>> unbound_norms(nn.Sequential(nn.Conv2d(64, 16, 1), nn.Dropout(), PracticalGroupNorm(16)))
        ['2']
    """
    return [name for name, norm in model.named_modules() if isinstance(norm, GroupNorm) and not norm.is_bound()]


@contextmanager
def runnable(norms):
    """Norms that are not bound have a group while within."""
    unbound = {norm: norm.num_groups for norm in norms if not norm.is_bound()}
    for norm in unbound:
        norm.num_groups, norm.weight_layer = norm.num_groups or 1, NO_LAYER
    try:
        yield
    finally:
        for norm, num_groups in unbound.items():
            norm.num_groups, norm.weight_layer = num_groups, None


def _layers(norm, name, producers) -> List[Producer]:
    """The weight layers that made the inputs of ``norm``, all with as many input channels."""
    layers = [made for made in dict.fromkeys(producers) if made.n_out == norm.num_channels]
    others = [made.op for made in producers if made.n_out != norm.num_channels]
    if norm.needs_layer() and layers and (others or len({made.n_in for made in layers}) > 1):
        made_by = ", ".join([*(_describe_producer(made) for made in layers), *dict.fromkeys(others)])
        raise InputError(
            f"{name}: this {norm.norm_name()} is used in several places, with inputs made by {made_by}. Give each "
            f"place a norm of its own"
        )
    return [] if others else layers


def bind_to_producers(norm, producers):
    if not producers:
        norm.bind(norm.num_channels, NO_LAYER)
    for made in producers:
        norm.bind(made.n_in, _describe_producer(made))
        if norm.weight_standardization:
            standardize(made.layer, norm.norm_name())


def _describe_producer(made):
    sizes = made.n_in, made.n_out
    return describe(made.layer) if _sizes(made.layer) == sizes else f"{made.op}{sizes}"


def _give_back_weights(model, layers):
    """Convolutions that were standardized for norms which do not follow them are plain ones again."""
    norms = {norm for norm in layers if norm.weight_standardization}
    standardized = {layer for _, norm, _, layer in named_norms(model) if norm in norms}
    for layer in standardized - {made.layer for producers in layers.values() for made in producers}:
        if original_class(layer) is WSConv2d:
            unstandardize(layer)
