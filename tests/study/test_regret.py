"""The regret of a norm, compared with what can be counted by hand."""

import itertools
from statistics import mean

import numpy as np
import pytest

from study.regret import FIXED, read_values, regret, table
from study.report import summarize
from study.rows import write_rows

SEEDS = (0, 1, 2)


def values(seed):
    numbers = np.random.default_rng(seed)
    return {norm: dict(zip(SEEDS, numbers.normal(30, 2, 3).tolist())) for norm in (*FIXED, "PGN")}


def brute_force(norm, sets):
    """The regret and its interval, by a loop over every pair of draws."""

    def shortfall(of, draw):
        return max(mean(of[name][s] for s in draw) for name in FIXED) - mean(of[norm][s] for s in draw)

    draws = list(itertools.product(SEEDS, repeat=3))
    worst = sorted(max(shortfall(of, d) for of, d in zip(sets, pair)) for pair in itertools.product(draws, repeat=2))
    # the smallest that at least this share does not exceed
    bounds = [next(w for i, w in enumerate(worst, 1) if i >= share * len(worst)) for share in (0.025, 0.975)]
    return max(shortfall(of, SEEDS) for of in sets), *bounds


@pytest.mark.parametrize("norm", ["GN/1", "PGN"])
def test_brute_force(norm):
    first, second = values(1), values(2)
    row = regret(norm, {"a": first, "b": second})
    assert (row.regret, row.low, row.high) == pytest.approx(brute_force(norm, [first, second]))
    assert row.regret == max(row.shortfalls.values()) and list(row.shortfalls) == ["a", "b"]


def test_better_than_every_number_of_groups_on_both_sets_is_below_0(line_of):
    of = {norm: dict.fromkeys(SEEDS, 30.0) for norm in FIXED}
    best = {**of, "PGN": dict.fromkeys(SEEDS, 31.0)}
    assert (regret("PGN", {"a": best, "b": best}).regret, regret("GN", {"a": best}).regret) == (-1, 0)
    text = table({"a": {**best, "other": {}}, "b": best})
    assert line_of(text, "PGN") == ["PGN", "-1.00, 3 seeds", "-1.00, 3 seeds", "-1.00 (-1.00 to -1.00)"]
    assert "other" not in text  # of one set alone


def test_seeds_that_a_norm_lacks_count_for_no_norm():
    of = {norm: {0: 30.0, 1: 30.0, 2: 90.0} for norm in FIXED}
    row = regret("PGN", {"a": {**of, "PGN": {0: 29.0, 1: 29.0}}})
    assert (row.regret, row.seeds) == (1, {"a": 2})


def test_a_seed_without_a_value_is_left_out(tmp_path):
    of = {"GN": {0: {"AP": 40.0}, 1: {"AP": 41.0}}, "PGN": {0: {"AP": None}, 1: {"AP": 39.0}}}
    write_rows(tmp_path / "bed.json", summarize(of, {}))
    assert read_values(str(tmp_path), ["bed"], "AP") == {"GN": {0: 40.0, 1: 41.0}, "PGN": {1: 39.0}}


def test_ten_seeds_take_no_longer_than_a_moment():
    """Ten seeds have 10^10 draws, of which 92,378 differ. A sample of them stands in for all."""
    numbers = np.random.default_rng(0)
    of = {norm: dict(enumerate(numbers.normal(30, 2, 10).tolist())) for norm in FIXED}
    row = regret("GN", {"a": of, "b": of})
    draws = numbers.integers(0, 10, (4000, 2, 10))
    fixed = np.array([list(values.values()) for values in of.values()])
    worst = (fixed[:, draws].mean(3).max(0) - fixed[0][draws].mean(2)).max(1)
    assert (row.low, row.high) == pytest.approx(np.quantile(worst, [0.025, 0.975]), abs=0.15)


def test_values_of_several_files(tmp_path):
    runs = {"GN": {0: {"AP": 1.0, "AP50": 9.0}, 1: {"AP": 2.0}}}
    write_rows(tmp_path / "one.json", summarize(runs, {}))
    write_rows(tmp_path / "two.json", summarize({"PGN": {0: {"AP": 3.0}}}, {}))
    found = read_values(str(tmp_path), ("one", "two", "missing"), "AP")
    assert found == {"GN": {0: 1.0, 1: 2.0}, "PGN": {0: 3.0}}
