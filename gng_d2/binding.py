"""How a norm finds the weight layer that feeds it.

PyTorch calls a global hook whenever a module becomes a child of another, so a norm meets its layer
while the model is being built, and no class of Detectron2 has to know of it.
"""

from typing import Iterator, Optional, Tuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_module_registration_hook

from .layers import GroupNorm

__all__ = ["num_channels", "layer_shape", "weight_layer", "named_norms", "bind_on_registration"]


def num_channels(module: nn.Module) -> Optional[int]:
    """Channels of a normalization layer (PyTorch's and Detectron2's); None for any other module."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, _NormBase) or type(module).__name__ == "FrozenBatchNorm2d":
        return module.num_features
    if type(module).__name__ == "LayerNorm":
        return module.normalized_shape[-1]
    return None


def layer_shape(module: nn.Module) -> Optional[Tuple[int, int]]:
    """(n_in, n_out) of a weight layer (convolution, transposed, deformable, linear); None for others."""
    # Detectron2's deformable convolutions take their norm before they make their weight.
    if not isinstance(getattr(module, "weight", None), Tensor) and not hasattr(module, "kernel_size"):
        return None
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
    for sibling_name, sibling in parent.named_children():
        if sibling_name == name:
            break
        before = sibling
    if before is None or not _feeds(before, norm):
        return None
    claimed = any(num_channels(child) is not None for child in before.children())
    return None if claimed else before


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
    """The hook: binds ``child``, if it is a norm of ours, to its weight layer."""
    if not isinstance(child, GroupNorm):
        return
    given = child.in_channels is not None and child.weight_layer is None
    layer = None if given else weight_layer(parent, name, child)
    # A convolution that takes over a bound norm is sure to feed it; what stands before it need not.
    if layer is not None and (layer is parent or child.in_channels is None):
        child.bind(layer, layer_shape(layer)[0])


register_module_module_registration_hook(bind_on_registration)
