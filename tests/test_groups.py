import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gng_d2 import ideal_num_groups, isometry_ratio, practical_num_groups
from gng_d2.groups import GROUP_CHOICES, nearest_divisor

# (n_in, n_out) -> practical number of groups, worked out by hand from Algorithm 1
WORKED = {
    (784, 512): 64,
    (128, 64): 16,
    (256, 128): 32,
    (256, 64): 64,
    (512, 128): 128,
    (2048, 256): 256,
    (64, 256): 1,
    (128, 128): 1,
    (3, 64): 1,
    (39, 16): 8,
    (1, 1): 1,
    (100, 7): 7,
}


@pytest.mark.parametrize("shape, num_groups", WORKED.items())
def test_worked_values(shape, num_groups):
    assert practical_num_groups(*shape) == num_groups


def test_ideal_is_neither_bounded_nor_rounded():
    assert ideal_num_groups(256, 64) == 48
    assert ideal_num_groups(39, 16) == 5.75
    assert ideal_num_groups(128, 128) == 0
    assert ideal_num_groups(3, 64) == -15.25
    assert ideal_num_groups(100, 50, gain_ratio=2) == 37.5


def brute_force(n_in, n_out, gain_ratio):
    """Algorithm 1 line by line, in floats."""
    bounded = min(max((gain_ratio * n_in - n_out) / 4, 1), n_out)
    divisors = [d for d in range(1, n_out + 1) if n_out % d == 0]
    return min(divisors, key=lambda d: abs(math.log2(bounded) - math.log2(d)))


def test_against_brute_force():
    rng = random.Random(0)
    for _ in range(1000):
        n_in, n_out = rng.randint(1, 5000), rng.randint(1, 600)
        gain_ratio = rng.choice([1.0, 1.0, 0.849, 2.5])
        assert practical_num_groups(n_in, n_out, gain_ratio) == brute_force(n_in, n_out, gain_ratio)


@given(st.integers(1, 5000), st.fractions(min_value=Fraction(1, 100), max_value=10**5, max_denominator=1000))
def test_the_nearest_divisor_is_a_divisor_and_none_is_nearer(n, x):
    nearest = nearest_divisor(n, x)
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    assert nearest in divisors
    assert all(max(nearest / x, x / nearest) <= max(d / x, x / d) for d in divisors)  # exact: x is a fraction


def test_exact_where_floats_are_not():
    assert ideal_num_groups(10**17 + 1, 10**17) == 0.25
    # the divisors 1 and 2 are equally near to sqrt(2), which these two numbers enclose
    above = Fraction(math.sqrt(2))
    below = Fraction(math.nextafter(math.sqrt(2), 0))
    assert below**2 < 2 < above**2
    assert practical_num_groups(4, 2, gain_ratio=above + Fraction(1, 2)) == 2
    assert practical_num_groups(4, 2, gain_ratio=below + Fraction(1, 2)) == 1


def test_isometry_ratio():
    assert isometry_ratio(128, 128, 1) == 1.03125
    assert isometry_ratio(128, 128, 32) == 2
    assert isometry_ratio(256, 128, 32) == 1
    for n_in, n_out, gain_ratio in [(784, 512, 1), (39, 16, 1), (100, 64, 1.18), (30, 64, 3.25)]:
        ideal = ideal_num_groups(n_in, n_out, gain_ratio)
        assert isometry_ratio(n_in, n_out, ideal, gain_ratio) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("function", [ideal_num_groups, practical_num_groups, lambda *a: isometry_ratio(*a, 1)])
@pytest.mark.parametrize(
    "bad, error",
    [
        (0, ValueError),
        (-4, ValueError),
        (8.0, TypeError),
        (True, TypeError),
        ("8", TypeError),
        (None, TypeError),
        (np.bool_(True), TypeError),
    ],
)
def test_bad_sizes(function, bad, error):
    with pytest.raises(error, match="n_in must be a positive integer"):
        function(bad, 8)
    with pytest.raises(error, match="n_out must be a positive integer"):
        function(8, bad)


@pytest.mark.parametrize(
    "bad, error",
    [
        (0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ],
)
def test_bad_gain_ratio_and_num_groups(bad, error):
    with pytest.raises(error, match="^gain_ratio must be a positive"):
        practical_num_groups(8, 8, bad)
    with pytest.raises(error, match="^num_groups must be a positive"):
        isometry_ratio(8, 8, bad)


def test_the_choices_that_the_paper_compares():
    chosen = {name: [choose(256, n_out) for n_out in (48, 64, 128)] for name, choose in GROUP_CHOICES.items()}
    assert chosen == {"GN": [None, 32, 32], "GN1": [1, 1, 1], "PGN": [48, 64, 32]}


def test_numpy_numbers():
    assert practical_num_groups(np.int64(784), np.int32(512), np.float32(1)) == 64
    assert isometry_ratio(np.int64(128), 128, np.int64(32)) == 2
