import math

import pytest
import torch

from gng_d2 import activation_gains, ideal_num_groups, isometry_ratio

# Table 2 of the paper: sigma -> activation -> (F, B), from 10^7 samples, to three decimals
PAPER = {
    0.1: {"relu": (0.500, 0.500), "prelu": (0.531, 0.531), "gelu": (0.255, 0.256), "silu": (0.252, 0.253),
          "elu": (0.928, 0.929), "selu": (1.876, 1.879), "sigmoid": (25.079, 0.062), "tanh": (0.981, 0.981),
          "softplus": (48.438, 0.251), "softsign": (0.751, 0.757), "logsigmoid": (48.495, 0.251)},
    1: {"relu": (0.500, 0.500), "prelu": (0.532, 0.532), "gelu": (0.425, 0.456), "silu": (0.356, 0.379),
        "elu": (0.645, 0.668), "selu": (1.000, 1.071), "sigmoid": (0.293, 0.045), "tanh": (0.394, 0.464),
        "softplus": (0.921, 0.293), "softsign": (0.183, 0.228), "logsigmoid": (0.921, 0.293)},
    10: {"relu": (0.500, 0.500), "prelu": (0.531, 0.531), "gelu": (0.500, 0.506), "silu": (0.499, 0.507),
         "elu": (0.504, 0.520), "selu": (0.565, 0.613), "sigmoid": (0.005, 0.007), "tanh": (0.009, 0.053),
         "softplus": (0.501, 0.461), "softsign": (0.007, 0.026), "logsigmoid": (0.501, 0.461)},
}  # fmt: skip


@pytest.mark.parametrize("sigma", PAPER)
@pytest.mark.parametrize("activation", PAPER[1])
def test_table_2(activation, sigma):
    for gain, paper in zip(activation_gains(activation, sigma), PAPER[sigma][activation]):
        assert gain == pytest.approx(paper, rel=1.2e-3, abs=1.1e-3)


@pytest.mark.parametrize("sigma", [0.1, 1, 10])
@pytest.mark.parametrize("slope", [0.0, 0.25, 1.0])
def test_homogeneous_activations_have_closed_forms(slope, sigma):
    forward, backward = activation_gains(lambda x: torch.nn.functional.leaky_relu(x, slope), sigma)
    assert forward == pytest.approx((1 + slope**2) / 2, rel=1e-7) and backward == pytest.approx(forward, rel=1e-7)


def test_other_closed_forms():
    # E[sin^2] = (1 - e^(-2 s^2)) / 2, E[cos^2] = (1 + e^(-2 s^2)) / 2, E[x^6] = 15 s^6, E[9 x^4] = 27 s^4
    forward, backward = activation_gains(torch.sin, 0.7)
    decay = math.exp(-2 * 0.7**2)
    assert forward == pytest.approx((1 - decay) / 2 / 0.7**2, rel=1e-9)
    assert backward == pytest.approx((1 + decay) / 2, rel=1e-9)
    assert activation_gains(lambda x: x**3, 2.0) == pytest.approx((15 * 2**4, 27 * 2**4), rel=1e-9)


def test_gain_ratio_makes_a_block_isometric():
    forward, backward = activation_gains("tanh")
    ideal = ideal_num_groups(256, 64, forward / backward)
    assert isometry_ratio(256, 64, ideal, forward / backward) == pytest.approx(1)
    assert ideal != ideal_num_groups(256, 64)


def test_bad_input():
    with pytest.raises(ValueError, match="unknown activation 'reul'; known: relu"):
        activation_gains("reul")
    with pytest.raises(ValueError, match="sigma"):
        activation_gains("relu", 0)
    with torch.no_grad():
        assert activation_gains("RELU") == activation_gains("relu")
