import math

import pytest
import torch

from gng_d2 import activation_gains, ideal_num_groups, isometry_ratio
from study.paper import TABLE_2


@pytest.mark.parametrize("sigma", TABLE_2)
@pytest.mark.parametrize("activation", TABLE_2[1])
def test_table_2(activation, sigma):
    for gain, paper in zip(activation_gains(activation, sigma), TABLE_2[sigma][activation]):
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


@pytest.mark.parametrize(
    "activation, name",
    [(torch.nn.ReLU(inplace=True), "relu"), (torch.nn.functional.elu_, "elu"), (torch.nn.PReLU(), "prelu")],
)
def test_activations_that_write_in_place_or_have_parameters(activation, name):
    assert activation_gains(activation) == activation_gains(name)
    assert all(parameter.dtype == torch.float32 for parameter in getattr(activation, "parameters", tuple)())


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
    with pytest.raises(ValueError, match="finite"):
        activation_gains("relu", math.inf)
    with torch.no_grad():
        assert activation_gains("RELU") == activation_gains("relu")


def test_in_inference_mode():
    with torch.inference_mode():
        assert activation_gains("relu") == activation_gains("relu", 2.0) == pytest.approx((0.5, 0.5))
        assert activation_gains(torch.nn.PReLU()) == activation_gains("prelu")
    assert activation_gains(torch.nn.PReLU()) == activation_gains("prelu")
