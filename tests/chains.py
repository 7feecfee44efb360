"""What the tests of recompute_norms compute again: a chain of convolutions and norms, and its images."""

import torch
from torch import nn

from gng_d2 import GroupNorm


def chain(*more):
    """Two blocks whose 3x3 convolutions are dear enough to be kept."""
    return nn.Sequential(
        *(nn.Conv2d(3, 128, 3, padding=1), GroupNorm(8, 128), nn.ReLU(inplace=True)),
        *(nn.Conv2d(128, 128, 3, padding=1), GroupNorm(8, 128), nn.ReLU(inplace=True), *more),
    )


def images(count=2, size=16):
    return torch.randn(count, 3, size, size)
