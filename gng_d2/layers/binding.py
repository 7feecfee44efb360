"""How a norm finds the weight layer that feeds it when it is registered.

PyTorch calls a global hook whenever a module becomes a child of another, so a norm meets its layer while the model is
being built, and Detectron2's classes need no change. Where the order in which a model is built does not show the layer,
:func:`gng_d2.bind_norms` runs the model to find it.
"""

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from gng_d2.errors import InputError, abbreviated

from .class_change import has
from .group_norm import GroupNorm
from .kinds import NO_LAYER, Producer, layer_shape, layer_sizes, num_channels, own
from .ws_conv import WSConv2d, standardize


def weight_layer(parent: nn.Module, name: str, norm: nn.Module) -> nn.Module | None:
    """The weight layer that feeds ``norm``, where ``norm`` is or becomes the child ``name`` of ``parent``.

    It is ``parent`` itself, as in Detectron2's ``Conv2d``, or the child registered immediately
    before, if that child has as many output channels and no norm of its own. In all other cases the
    result is None, because a guess could be wrong.
    """
    if _feeds(parent, norm):
        return parent
    before = None
    for sibling_name, sibling in parent._modules.items():  # named_children() leaves out repeated children
        if sibling_name == name:
            break
        before = sibling if sibling is not None else before
    if before is not None and _feeds(before, norm):
        claimed = any(num_channels(child) is not None for child in before.children())
        return None if claimed else before
    # Detectron2's deformable convolutions take their norm before they make their weight.
    unfinished = name == "norm" and before is None and own(parent, "kernel_size") is not None
    return parent if unfinished and (layer_sizes(parent) or (0, 0))[1] == num_channels(norm) else None


def _feeds(layer, norm):
    shape = layer_shape(layer)
    return shape is not None and shape[1] == num_channels(norm)


def named_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None, nn.Module | None]]:
    """(name, norm, name of its weight layer, that layer) for each norm of ``model``, in its order.

    The last two are None where no weight layer was found.
    """
    names = {module: name for name, module in model.named_modules()}
    for parent in list(names):
        for name, child in parent.named_children():
            if num_channels(child) is not None:
                layer = weight_layer(parent, name, child)
                if isinstance(child, GroupNorm) and child.in_channels is not None and layer is not None:
                    if not _may_follow(child, layer):
                        layer = None  # the norm was bound to another one
                yield names[child], child, names.get(layer), layer


def _may_follow(norm, layer):
    """Whether ``layer`` may be the one to which ``norm`` was bound, by its sizes and its standardization."""
    if norm.weight_layer == NO_LAYER or (norm.weight_standardization and not has(layer, WSConv2d)):
        return False
    return layer_sizes(layer) == (norm.in_channels, norm.num_channels)


def bind(norm: GroupNorm, layer: nn.Module) -> None:
    """Make ``layer`` the weight layer of ``norm``: ``norm`` takes its groups from it and may standardize its weight.

    Raises:
        InputError: the groups do not divide the layer's output channels, or the layer cannot be standardized.
    """
    n_in, n_out = layer_sizes(layer)  # type: ignore[misc]
    description = str(Producer(type(layer).__name__, n_in, n_out))
    if norm.weight_standardization:
        standardize(layer, norm.norm_name())
    norm.bind(n_in, description)
    norm.follows_registration = True


def _bind_on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """The hook: if ``child`` is a norm of ours, it is bound to its weight layer. If ``child`` is a layer that
    replaces the one that the norm right after it follows, that norm is bound again."""
    replaced = parent._modules.get(name)
    if replaced is child:  # PyTorch's convert_sync_batchnorm, say, registers what it leaves as it is again
        return
    if isinstance(child, GroupNorm):
        child.look_again()
        layer = None if has_given_in_channels(child) else weight_layer(parent, name, child)
        # A convolution that takes a bound norm as its child certainly feeds it; a layer that stands before it may not.
        if layer is not None and (layer is parent or child.in_channels is None or not child.needs_layer()):
            _bind_or_defer(child, layer)
    elif replaced is not None and child is not None:
        names = list(parent._modules)
        after = parent._modules.get(names[names.index(name) + 1]) if name != names[-1] else None
        if isinstance(after, GroupNorm) and not has_given_in_channels(after) and _feeds(child, after):
            if after.in_channels is None or _may_follow(after, replaced):
                _bind_or_defer(after, child)


def has_given_in_channels(norm):
    """Whether the user gave its in_channels, so that they were not taken from a layer."""
    return norm.in_channels is not None and norm.weight_layer is None


# norm -> why it cannot follow its layer; None outside build_naming_norms
_deferred: ContextVar[dict[GroupNorm, InputError] | None] = ContextVar("deferred", default=None)


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
    """Return the model that ``build(*args)`` makes.

    A norm has no path before the model is complete, so an error of binding is raised only then.

    Raises:
        InputError: a norm cannot follow its layer; the message names the norm by its path.
    """
    deferred: dict[GroupNorm, InputError] = {}
    token = _deferred.set(deferred)
    try:
        model = build(*args)
    finally:
        _deferred.reset(token)
    failed = [(path, deferred[module]) for path, module in model.named_modules() if module in deferred]
    if failed:
        error = failed[0][1]
        raise InputError(f"{abbreviated((path for path, _ in failed), most=1)}: {error}") from error
    return model


@cache
def install_binding_hook() -> None:
    """Have PyTorch call the hook whenever a module becomes a child of another. Later calls do nothing."""
    register_module_module_registration_hook(_bind_on_registration)


def unbound_norms(model: nn.Module) -> list[str]:
    """Names of the norms of ``model`` that cannot run yet, because they have not met the weight layer that they need.

    Examples::
        >>> unbound_norms(nn.Sequential(nn.Conv2d(64, 16, 1), nn.Dropout(), PracticalGroupNorm(16)))
        ['2']
    """
    return [name for name, norm in model.named_modules() if isinstance(norm, GroupNorm) and not norm.is_bound()]
