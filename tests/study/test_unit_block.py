import math

import pytest
import torch

from study.unit_block import UnitBlock, estimate, exact_ratios, has_finite_variance, measure_ratios, paper_ratios

DEVIATIONS = 5  # of a standard error: the seed is fixed, so this is a margin for other versions of PyTorch


def measured(block, experiments=200, inputs=64):
    """The value and the standard error of each equation."""
    ratios = measure_ratios(block, experiments, inputs, torch.Generator().manual_seed(0))
    return {e: (r.mean().item(), (r.std() / math.sqrt(len(r))).item()) for e, r in ratios.items()}


def check(measurement, expected):
    value, error = measurement
    assert abs(value - expected) < DEVIATIONS * error
    assert error < 0.02 * expected


@pytest.fixture(scope="module")
def linear():
    return measured(UnitBlock(256, 128, 8))


def test_groups_of_16_pass_what_is_exact_and_not_what_the_paper_says(linear):
    check(linear["B"], 14 / 13)
    value, error = linear["B"]
    assert abs(value - 1.25) > 20 * error


def test_relu_passes_half(linear):
    check(linear["C"], 0.5)


def test_weight_layer_passes_all_but_the_direction_of_its_input(linear):
    check(linear["A"], 127.5)


def test_block(linear):
    check(linear["D"], 14 / 13 / 2 * (1 - 1 / 256))


def test_one_group():
    ratios = measured(UnitBlock(64, 32, 1))
    check(ratios["B"], 30 / 29)
    check(ratios["A"], 31.5)


def test_groups_of_4_by_median_of_means():
    block = UnitBlock(64, 32, 8)
    assert [has_finite_variance(block, equation) for equation in "ABCD"] == [True, False, True, False]
    ratios = measure_ratios(block, 400, 256, torch.Generator().manual_seed(0))
    value, low, high = estimate(ratios["B"], finite_variance=False)
    assert low < value < high and low < 2 < high
    assert value == pytest.approx(2, rel=0.05)  # the paper's formula and the exact one meet here


def test_estimates():
    repeats = torch.arange(1.0, 21.0, dtype=torch.float64)  # deviation sqrt(35)
    half = 1.96 * math.sqrt(35 / 20)
    assert estimate(repeats, True) == pytest.approx((10.5, 10.5 - half, 10.5 + half))
    assert estimate(repeats, False) == pytest.approx((10.5, 1.95, 19.05))


def test_convolution_lies_far_below_the_paper_for_small_groups():
    """With one channel in a group the paper's formula gives 2.5. ReLU features have a mean, which is 1/pi of the energy
    of each channel and is removed by the norm. So D is at most 1/2 / (1 - 1/pi), apart from the border."""
    block = UnitBlock(64, 32, 32, 3, 8)
    assert paper_ratios(block)["D"] == 2.5
    value, error = measured(block, 40, 8)["D"]
    assert value - DEVIATIONS * error > 0.5 and value + DEVIATIONS * error < 0.5 / (1 - 1 / math.pi)


def test_formulas():
    block = UnitBlock(1024, 512, 128)
    assert block.group_size == 4
    assert paper_ratios(block) == {"A": 512, "B": 2, "C": 0.5, "D": 1}
    assert exact_ratios(block) == {"A": 511.5, "B": 2, "C": 0.5, "D": 1023 / 1024}
    assert exact_ratios(UnitBlock(64, 32, 16))["B"] is None  # no bound
    assert exact_ratios(UnitBlock(64, 32, 8, 3, 4)) == dict.fromkeys("ABCD")


def test_seed_decides():
    block = UnitBlock(16, 8, 1)
    runs = [measure_ratios(block, 20, 2, torch.Generator().manual_seed(seed))["D"] for seed in (1, 1, 2)]
    assert runs[0].equal(runs[1]) and not runs[0].equal(runs[2])
    assert runs[0].shape == (20,) and runs[0].dtype == torch.float64
