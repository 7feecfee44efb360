"""What a norm is, what a weight layer is, and what made a tensor."""

from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

# the weight_layer of a norm that follows no weight layer, or several
NO_LAYER = "no single weight layer"


class Producer(NamedTuple):
    """What made a tensor: a weight layer, or another op, which has no sizes."""

    op: str  # where the model was run, the class of the layer that called it
    n_in: int | None = None
    n_out: int | None = None
    layer: nn.Module | None = None  # the module that called the op, where the model was run
    weight: Any = None  # in training autograd's node of the weight; None where the weight is not a parameter

    @property
    def is_layer(self) -> bool:
        return self.n_in is not None

    def __str__(self):
        """For instance "Conv2d(256, 128)"."""
        return f"{self.op}({self.n_in}, {self.n_out})" if self.is_layer else self.op


def own(module: nn.Module, name: str) -> Any:
    """The attribute ``name`` of ``module`` or its class, or None.

    A ``__getattr__`` that the user wrote is not called, because it may fail while the module is under construction.
    """
    kept = vars(module)
    for names in (kept, kept.get("_parameters"), kept.get("_buffers")):
        if names and name in names:
            return names[name]
    parametrizations = kept.get("_modules", {}).get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and name in parametrizations:
        return next(parametrizations[name].parameters(), None)  # to compute it would be a step of spectral norm
    value = getattr(type(module), name, None)
    if not isinstance(value, property):
        return value
    try:
        return value.__get__(module)
    except Exception:  # the user's code may raise any error
        return None


def num_channels(module: nn.Module) -> int | None:
    """Channels of a normalization layer (PyTorch's and Detectron2's); None for any other module."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, _NormBase):
        return module.num_features
    if type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d"):  # not all of these have num_features
        weight = own(module, "weight")
        return weight.numel() if isinstance(weight, Tensor) else None
    if type(module).__name__ == "LayerNorm":
        shape = own(module, "normalized_shape")  # PyTorch's is a tuple
        return shape if isinstance(shape, int) else (shape or (None,))[-1]
    return None


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(n_in, n_out) of a weight layer (convolution, transposed, deformable, linear); None for others."""
    return layer_sizes(module) if isinstance(own(module, "weight"), Tensor) else None


def layer_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(n_in, n_out) of a module that has such attributes, also while it is under construction and has no weight."""
    for names in (("in_channels", "out_channels"), ("in_features", "out_features")):
        n_in, n_out = (own(module, name) for name in names)
        if isinstance(n_in, Integral) and isinstance(n_out, Integral) and n_in and n_out:
            return int(n_in), int(n_out)  # of NumPy's numbers too, which no checkpoint can hold
    return None


def num_groups(norm: nn.Module) -> int | None:
    """The number of groups of a group norm or layer norm; None for a norm over the batch."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    return 1 if type(norm).__name__ == "LayerNorm" else None


def is_of_single_images(module: nn.Module) -> bool:
    """Whether it normalizes each image separately. Detectron2's and timm's LayerNorms of channels do, too."""
    kinds = nn.GroupNorm, nn.LayerNorm, _InstanceNorm
    return isinstance(module, kinds) or "LayerNorm" in type(module).__name__
