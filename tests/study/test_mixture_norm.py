"""The relatives of LGN, and their names in a config."""

import math

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

from gng_d2 import GroupNorm, WSConv2d
from gng_d2.layers import LearnedGroupNorm
from gng_d2.ops import group_sizes, learned_group_norm
from study.mixture_norm import NORMS, MixtureNorm


def softmax(logits, rate):
    powers = [math.exp(rate * logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def weights_of(name, norm):
    """The mixtures that the docstring of the module describes."""
    n = len(group_sizes(norm.num_channels))
    if name == "MIX-uniform":
        return [[1 / n] * n] * 2
    if name.startswith("MIX-fixed"):
        return [[1.0, *[0.0] * (n - 1)], [*[0.0] * (n - 1), 1.0]]
    rate = 10**0.5 if name == "MIX-slow" else 10
    logits = norm.logits.tolist()
    assert len(logits) == (1 if name == "MIX-shared" else 2)
    return [softmax(logits[0], rate), softmax(logits[-1], rate)]


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("name", NORMS)
def test_output_and_what_learns(name, channels):
    norm = get_norm(name, channels)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = 2 * torch.randn(2, channels, 3, 5) + torch.randn(channels, 1, 1)
    expected = learned_group_norm(x, torch.tensor(weights_of(name, norm)), norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected)
    norm(x).sin().sum().backward()
    assert (norm.logits.grad is not None) == (name in ("MIX-slow", "MIX-shared"))


def test_mixtures_learn_as_fast_as_their_rate_says():
    """One small step of SGD on the same loss moves LGN's 100 times as far as with a rate of 1, and those of MIX-slow 10
    times."""
    x = torch.randn(2, 8, 4, 4, dtype=torch.double)
    moved = []
    for norm in (MixtureNorm(8, rate=1, name="MIX"), get_norm("MIX-slow", 8), get_norm("LGN", 8)):
        norm.double()(x).sin().sum().backward()
        before = norm.weights().detach()
        with torch.no_grad():
            norm.logits -= 1e-4 * norm.logits.grad
        moved.append(norm.weights().detach() - before)
    torch.testing.assert_close(moved[1].double(), 10 * moved[0], rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(moved[2].double(), 100 * moved[0], rtol=1e-2, atol=1e-6)


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
        assert isinstance(last.norm, MixtureNorm) and last.norm.norm_name() == name + ws
        kind = MixtureNorm if name != "MIX-fixed-last" else GroupNorm
        assert all(isinstance(layer.norm, kind) for layer in first)
        assert not any(isinstance(layer.norm, LearnedGroupNorm) for layer in first if kind is GroupNorm)
        assert all(isinstance(layer, WSConv2d) == bool(ws) for layer in (*first, last))
