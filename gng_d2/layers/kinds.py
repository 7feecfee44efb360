"""What a norm is, what a weight layer is, and what made a tensor."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["NO_LAYER", "Producer", "describe", "is_of_single_images", "layer_shape", "layer_sizes", "num_channels"]
__all__ += ["num_groups", "own"]

# what a norm has for its weight layer that follows none, or several
NO_LAYER = "no single weight layer"


class Producer(NamedTuple):
    """What made a tensor: a weight layer, or an op that is none and has no sizes."""

    op: str
    n_in: int | None = None
    n_out: int | None = None
    layer: nn.Module | None = None  # the module that called the op, where the model was run
    weight: Any = None  # in training autograd's node of the parameter that is the weight; None where none is

    @property
    def is_layer(self) -> bool:
        return self.n_in is not None

    def __str__(self):
        """For instance "Conv2d(256, 128)"."""
        if self.layer is not None and layer_sizes(self.layer) == (self.n_in, self.n_out):
            return describe(self.layer)
        return f"{self.op}({self.n_in}, {self.n_out})" if self.is_layer else self.op


# what weight layers call their sizes
_SIZES = (("in_channels", "out_channels"), ("in_features", "out_features"))


def own(module: nn.Module, name: str) -> Any:
    """What ``module`` or its class has by that name, or None.

    A ``__getattr__`` of the user's own is not called: it may need what a module under construction does not have yet.
    """
    kept = vars(module)
    for names in (kept, *(kept.get(kind) or {} for kind in ("_parameters", "_buffers", "_modules"))):
        if name in names:
            return names[name]
    value = getattr(type(module), name, None)
    if not isinstance(value, property):
        return value
    try:
        return value.__get__(module)  # the weight of a parametrized layer
    except Exception:  # of any kind: it is the user's code
        return None


def num_channels(module: nn.Module) -> int | None:
    """Channels of a normalization layer (PyTorch's and Detectron2's); None for any other module."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, _NormBase):
        return module.num_features
    if type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d"):  # not every one has num_features
        weight = own(module, "weight")
        return weight.numel() if isinstance(weight, Tensor) else None
    if type(module).__name__ == "LayerNorm":
        return (own(module, "normalized_shape") or (None,))[-1]
    return None


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(n_in, n_out) of a weight layer (convolution, transposed, deformable, linear); None for others."""
    return layer_sizes(module) if isinstance(own(module, "weight"), Tensor) else None


def layer_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(n_in, n_out) of what has such attributes, also of a layer under construction, which has no weight yet."""
    for names in _SIZES:
        n_in, n_out = (own(module, name) for name in names)
        if n_in and n_out:
            return n_in, n_out
    return None


def describe(layer: nn.Module) -> str:
    """For instance "Conv2d(256, 128)"."""
    return f"{type(layer).__name__}({', '.join(map(str, layer_sizes(layer) or ()))})"


def num_groups(norm: nn.Module) -> int | None:
    """Groups of a group or layer norm; None for a norm over the batch."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    return 1 if type(norm).__name__ == "LayerNorm" else None


def is_of_single_images(module: nn.Module) -> bool:
    """Whether it normalizes each image by itself; also Detectron2's and timm's LayerNorms of channels."""
    kinds = nn.GroupNorm, nn.LayerNorm, _InstanceNorm
    return isinstance(module, kinds) or "LayerNorm" in type(module).__name__
