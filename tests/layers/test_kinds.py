"""What counts as a norm and as a weight layer, in PyTorch and in other packages."""

import detectron2.layers
import pytest
import torch
import torchvision
from timm import layers as timm_layers
from torch import nn

from gng_d2 import PracticalGroupNorm
from gng_d2.layers.kinds import Producer, is_of_single_images, layer_shape, layer_sizes, num_channels, num_groups, own


class LayerNorm(nn.Module):
    """As projects write it, with an int."""

    def __init__(self, normalized_shape):
        super().__init__()
        self.normalized_shape = normalized_shape


# norm -> its channels, its groups, whether it normalizes each image separately
NORMS = [
    (nn.GroupNorm(2, 8), 8, 2, True),
    (PracticalGroupNorm(8, in_channels=24), 8, 4, True),
    (nn.InstanceNorm2d(8), 8, None, True),
    (nn.LayerNorm((5, 8)), 8, 1, True),
    (detectron2.layers.batch_norm.LayerNorm(8), 8, 1, True),
    (LayerNorm(8), 8, 1, True),
    (timm_layers.LayerNorm2d(8), None, None, True),
    (nn.BatchNorm1d(8), 8, None, False),
    (nn.SyncBatchNorm(8), 8, None, False),
    (timm_layers.BatchNormAct2d(8), 8, None, False),
    (detectron2.layers.FrozenBatchNorm2d(8), 8, None, False),
    (torchvision.ops.FrozenBatchNorm2d(8), 8, None, False),
    (timm_layers.FrozenBatchNormAct2d(8), 8, None, False),
    (nn.Conv2d(8, 8, 1), None, None, False),
]


@pytest.mark.parametrize("module, channels, groups, single", NORMS, ids=lambda value: type(value).__name__)
def test_norms(module, channels, groups, single):
    assert (num_channels(module), num_groups(module), is_of_single_images(module)) == (channels, groups, single)


@pytest.mark.parametrize("name", ["FrozenBatchNorm2d", "LayerNorm"])
def test_a_module_that_only_has_the_name_of_a_norm_is_none(name):
    assert num_channels(type(name, (nn.Module,), {})()) is None


def test_sizes_of_layers():
    linear, transposed = nn.Linear(24, 8), nn.ConvTranspose2d(24, 8, 2, groups=4)
    assert layer_shape(linear) == layer_shape(transposed) == layer_sizes(linear) == (24, 8)
    assert layer_shape(nn.utils.parametrizations.spectral_norm(nn.Linear(24, 8))) == (24, 8)
    assert layer_shape(nn.LazyLinear(8)) is None
    del linear.weight
    assert layer_shape(linear) is None and layer_sizes(linear) == (24, 8)
    linear.in_features = None
    assert layer_sizes(linear) is None and layer_shape(nn.ReLU()) is None


class Delegating(nn.Module):
    """Notes the names for which its ``__getattr__`` is called, and has a property that fails."""

    kernel_size, asked = 3, []

    def __init__(self):
        super().__init__()
        self.register_buffer("running", torch.ones(2))
        self.scale = nn.Parameter(torch.ones(1))

    @property
    def weight(self):
        raise RuntimeError

    @property
    def out_channels(self):
        return 8

    def __getattr__(self, name):
        self.asked.append(name)
        return super().__getattr__(name)


def test_own_attributes_are_found_without_the_users_getattr():
    module = Delegating()
    Delegating.asked.clear()
    found = [own(module, name) for name in ("training", "running", "scale", "kernel_size", "out_channels")]
    assert found[0] is True and found[1] is module._buffers["running"] and found[2] is module._parameters["scale"]
    assert found[3:] == [3, 8]
    assert own(module, "weight") is own(module, "in_channels") is None
    assert own(Delegating.__new__(Delegating), "running") is None, "before __init__ ran"
    assert not Delegating.asked


def test_a_producer_says_what_it_is():
    assert str(Producer("Conv2d", 24, 8)) == "Conv2d(24, 8)" and Producer("Conv2d", 24, 8).is_layer
    assert str(Producer("Relu")) == "Relu" and not Producer("Relu").is_layer
