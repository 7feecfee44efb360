"""What the tests of calibrate_norms calibrate: trained networks of batch norms, and the same with group norms."""

import copy

import torch
from torch import nn

from gng_d2 import GroupNorm, convert_norms


def images(number=8, size=12):
    return 3 * torch.randn(number, 3, size, size) + 1


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4)),
    )


NORMS = 1, 4, 7  # their places in network()


def with_statistics(reference):
    """Its batch norms have statistics of images like those of :func:`images`."""
    for _ in range(20):
        reference(images())
    return reference


def trained():
    """Batch norms with statistics and an affine of their own."""
    reference = with_statistics(network())
    for i in NORMS:
        nn.init.normal_(reference[i].weight), nn.init.normal_(reference[i].bias)
    return reference.eval()


def converted(reference, norm="GN1", inputs=None, **options):
    return convert_norms(copy.deepcopy(reference), norm, inputs, **options)


class TwoNorms(nn.Module):
    """``norm(width)`` makes one; a subclass says how they run."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), norm(4), norm(4)


def both(make):
    """``make(norm)`` with batch norms and with group norms, with the same parameters."""
    reference, model = make(nn.BatchNorm2d), make(lambda width: GroupNorm(2, width))
    model.load_state_dict(reference.state_dict(), strict=False)
    return reference, model


def has_hooks(*networks):
    return any(m._forward_hooks or m._forward_pre_hooks for each in networks for m in each.modules())


def assert_equal(found, expected):
    """Tensors, or lists or dicts of them."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
