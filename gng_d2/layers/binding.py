"""How a norm finds the weight layer that feeds it.

PyTorch calls a global hook whenever a module becomes a child of another, so a norm meets its layer
while the model is being built, and no class of Detectron2 has to know of it.
"""

from typing import Iterator, Optional, Tuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_module_registration_hook

from .group_norm import GroupNorm

__all__ = ["num_channels", "layer_shape", "weight_layer", "named_norms", "bind_on_registration"]


def num_channels(module: nn.Module) -> Optional[int]:
    """Channels of a normalization layer (PyTorch's and Detectron2's); None for any other module."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, _NormBase) or type(module).__name__ == "FrozenBatchNorm2d":
        return getattr(module, "num_features", None)
    if type(module).__name__ == "LayerNorm":
        return getattr(module, "normalized_shape", (None,))[-1]
    return None


def layer_shape(module: nn.Module) -> Optional[Tuple[int, int]]:
    """(n_in, n_out) of a weight layer (convolution, transposed, deformable, linear); None for others."""
    return _sizes(module) if isinstance(getattr(module, "weight", None), Tensor) else None


def _sizes(module):
    for names in (("in_channels", "out_channels"), ("in_features", "out_features")):
        n_in, n_out = (getattr(module, name, None) for name in names)
        if n_in and n_out:
            return n_in, n_out
    return None


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
                yield names[child], child, names.get(layer), layer


def bind_on_registration(parent: nn.Module, name: str, child: Optional[nn.Module]) -> None:
    """The hook: binds ``child``, if it is a norm of ours, to its weight layer. If it is a layer that takes
    the place of another, the norm right after it is bound anew."""
    if isinstance(child, GroupNorm):
        layer = None if _given(child) else weight_layer(parent, name, child)
        # A convolution that takes over a bound norm is sure to feed it; what stands before it need not.
        if layer is not None and (layer is parent or child.in_channels is None):
            child.bind(layer, _sizes(layer)[0])
    elif parent._modules.get(name) is not None and child is not None:
        names = list(parent._modules)
        after = parent._modules.get(names[names.index(name) + 1]) if name != names[-1] else None
        if isinstance(after, GroupNorm) and not _given(after) and _feeds(child, after):
            after.bind(child, _sizes(child)[0])


def _given(norm):
    """Whether its in_channels were given, and not taken from a layer."""
    return norm.in_channels is not None and norm.weight_layer is None


register_module_module_registration_hook(bind_on_registration)
