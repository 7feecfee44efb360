"""What a norm is, what a weight layer is, and what made a tensor."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["NO_LAYER", "Producer", "describe", "is_of_single_images", "layer_shape", "layer_sizes", "num_channels"]
__all__ += ["num_groups"]

# what a norm has for its weight layer that follows none, or several
NO_LAYER = "no single weight layer"


class Producer(NamedTuple):
    """What made a tensor: a weight layer, or an op that is none and has no sizes."""

    op: str
    n_in: int | None = None
    n_out: int | None = None
    layer: nn.Module | None = None  # the module that called the op, where the model was run
    weight: Any = None  # autograd's node from which the weight comes, in training; None where it has no gradient

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


def num_channels(module: nn.Module) -> int | None:
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


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(n_in, n_out) of a weight layer (convolution, transposed, deformable, linear); None for others."""
    return layer_sizes(module) if isinstance(getattr(module, "weight", None), Tensor) else None


def layer_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(n_in, n_out) of what has such attributes, also of a layer under construction, which has no weight yet."""
    for names in _SIZES:
        n_in, n_out = (getattr(module, name, None) for name in names)
        if n_in and n_out:
            return n_in, n_out
    return None


def describe(layer: nn.Module) -> str:
    """For instance "Conv2d(256, 128)"."""
    return f"{type(layer).__name__}({', '.join(map(str, layer_sizes(layer)))})"


def num_groups(norm: nn.Module) -> int | None:
    """Groups of a group or layer norm; None for a norm over the batch."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    return 1 if type(norm).__name__ == "LayerNorm" else None


def is_of_single_images(module: nn.Module) -> bool:
    """Whether it normalizes each image by itself; also Detectron2's and timm's LayerNorms of channels."""
    kinds = nn.GroupNorm, nn.LayerNorm, _InstanceNorm
    return isinstance(module, kinds) or "LayerNorm" in type(module).__name__
