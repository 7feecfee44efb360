"""Mixtures of group norms, and their names in a config."""

import math

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

from gng_d2 import GroupNorm, WSConv2d
from study.mixture_norm import NORMS, MixtureNorm


def brute_force(norm, x, of_mean, of_variance):
    """The norm's output in float64, computed from a list of each group's numbers."""
    x = x.double()
    y = torch.empty_like(x)
    for n, image in enumerate(x):
        for c in range(image.shape[0]):
            groups = [image[c // k * k : c // k * k + k] for k in norm.sizes]
            mean = sum(a * group.mean() for a, group in zip(of_mean, groups))
            variance = sum(b * group.var(correction=0) for b, group in zip(of_variance, groups))
            y[n, c] = norm.weight[c] * (image[c] - mean) / math.sqrt(variance + norm.eps) + norm.bias[c]
    return y


def softmax(logits, rate):
    powers = [math.exp(rate * logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def weights_of(name, norm):
    """The mixtures that the docstring of the module describes."""
    n = len(norm.sizes)
    if name == "MIX-uniform":
        return [1 / n] * n, [1 / n] * n
    if name.startswith("MIX-fixed"):
        return [1.0, *[0.0] * (n - 1)], [*[0.0] * (n - 1), 1.0]
    rate = 10**0.5 if name == "MIX-slow" else 10
    logits = norm.logits.tolist()
    assert len(logits) == (1 if name == "MIX-shared" else 2)
    return softmax(logits[0], rate), softmax(logits[-1], rate)


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("name", NORMS)
def test_brute_force(name, channels):
    norm = get_norm(name, channels)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = 2 * torch.randn(2, channels, 3, 5) + torch.randn(channels, 1, 1)
    torch.testing.assert_close(norm(x), brute_force(norm, x, *weights_of(name, norm)).float(), rtol=1e-4, atol=1e-5)


def test_sizes_are_the_powers_of_two_that_divide_the_channels_and_all_channels():
    assert MixtureNorm(64).sizes == [1, 2, 4, 8, 16, 32, 64]
    assert MixtureNorm(12).sizes == [1, 2, 4, 12]


@pytest.mark.parametrize("size", [1, 4, 16])
def test_one_size_alone_is_group_norm(size):
    norm = MixtureNorm(16, rate=10).double()
    with torch.no_grad():
        norm.logits[:, norm.sizes.index(size)] = 100
    x = torch.randn(2, 16, 4, 4, dtype=torch.double, requires_grad=True)
    (ours,) = torch.autograd.grad(norm(x).sin().sum(), x)
    y = torch.nn.functional.group_norm(x, 16 // size)
    torch.testing.assert_close(norm(x), y)
    torch.testing.assert_close(ours, *torch.autograd.grad(y.sin().sum(), x))


def test_weights_learn_as_fast_as_their_rate_says():
    """One small step of SGD on the same loss moves them 100 or 10 times as far as with a rate of 1."""
    x = torch.randn(2, 8, 4, 4, dtype=torch.double)
    moved = {}
    for rate in (1, math.sqrt(10), 10):
        norm = MixtureNorm(8, rate=rate).double()
        norm(x).sin().sum().backward()
        before = norm.mixtures()[0].detach()
        with torch.no_grad():
            norm.logits -= 1e-6 * norm.logits.grad
        moved[rate] = norm.mixtures()[0].detach() - before
    torch.testing.assert_close(moved[10], 100 * moved[1], rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(moved[math.sqrt(10)], 10 * moved[1], rtol=1e-3, atol=1e-12)


def test_no_boxes():
    norm = MixtureNorm(8, rate=10)
    assert norm(torch.empty(0, 8, 7, 7)).shape == (0, 8, 7, 7)


def test_other_names_are_what_they_were():
    assert isinstance(get_norm("GN", 64), GroupNorm) and get_norm("BN", 8).num_features == 8
    assert get_norm("", 8) is None
    with pytest.raises(ValueError, match="unknown norm 'MIXED'"):
        get_norm("MIXED", 8)


def head(norm):
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in (2, 3, 4, 5)}
    return SemSegFPNHead(shapes, num_classes=3, conv_dims=64, common_stride=4, norm=norm)


@pytest.mark.parametrize("ws", ["", "+WS"])
@pytest.mark.parametrize("name", NORMS)
def test_in_a_head(name, ws):
    for path in head(name + ws).scale_heads:
        *first, last = [layer for layer in path if isinstance(layer, Conv2d)]
        assert isinstance(last.norm, MixtureNorm) and last.norm.name == name + ws
        kind = GroupNorm if name == "MIX-fixed-last" else MixtureNorm
        assert all(isinstance(layer.norm, kind) for layer in first)
        assert all(isinstance(layer, WSConv2d) == bool(ws) for layer in (*first, last))
