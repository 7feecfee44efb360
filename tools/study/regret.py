"""The regret of a norm: how far it is behind the best fixed number of groups, on the set of data where it is worst."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .intervals import number_of_seeds
from .report import ComparisonRow
from .rows import markdown, read_rows

FIXED = ("GN", "GN1", "GN/16", "GN/1")  # what "the best fixed number of groups" is the best of
Values = Mapping[str, Mapping[int, float]]  # by norm and seed


@dataclass(frozen=True)
class Regret:
    norm: str
    shortfalls: dict[str, float]  # by set of data: the best mean of FIXED less the norm's
    seeds: dict[str, int]  # by set of data: how many seeds all of these norms have
    regret: float  # the largest shortfall
    low: float  # the 95 % interval of the regret
    high: float


def read_values(results: str, names: Sequence[str], metric: str) -> dict[str, dict[int, float]]:
    """The values of ``metric`` by norm and seed, from those files NAME.json in ``results`` that exist."""
    values = {}
    for path in (os.path.join(results, f"{name}.json") for name in names):
        for row in read_rows(path, ComparisonRow) if os.path.exists(path) else ():
            if row.metric == metric:
                of_seed = {seed: value for seed, value in zip(row.seeds, row.values) if value is not None}
                values.setdefault(row.norm, {}).update(of_seed)
    return values


def regret(norm: str, sets: Mapping[str, Values]) -> Regret:
    """The regret of ``norm`` over ``sets`` of data.

    The interval is a bootstrap: in each set seeds are drawn with replacement, the same ones for all norms, and the best
    of FIXED is chosen anew. No draw is left to chance: every draw counts with its probability.
    """
    measured = {name: _shortfall(norm, values) for name, values in sets.items()}
    shortfalls = {name: shortfall for name, (shortfall, _, _) in measured.items()}
    seeds = {name: count for name, (_, count, _) in measured.items()}
    drawn = [draws for _, _, draws in measured.values()]
    # The largest of independent shortfalls is at most x with the product of the probabilities that each of them is.
    worst = np.unique(np.concatenate([values for values, _ in drawn]))
    probability = np.prod([below[np.searchsorted(values, worst, "right")] for values, below in drawn], axis=0)
    low, high = worst[np.searchsorted(probability, [0.025 - 1e-12, 0.975 - 1e-12])]
    return Regret(norm, shortfalls, seeds, max(shortfalls.values()), float(low), float(high))


def _shortfall(norm, values):
    """The shortfall of ``norm`` as measured; the number of seeds that all norms have; and of all draws of as many seeds
    the shortfalls, in ascending order, with the probability that a draw is among the first 0, 1, 2, ... of them."""
    seeds = sorted(set.intersection(*(set(values[name]) for name in (*FIXED, norm))))
    n = len(seeds)
    fixed = np.array([[values[name][seed] for seed in seeds] for name in FIXED])
    own = np.array([values[norm][seed] for seed in seeds])
    draws = np.array([np.bincount(draw, minlength=n) for draw in itertools.combinations_with_replacement(range(n), n)])
    probabilities = stats.multinomial.pmf(draws, n, np.full(n, 1 / n))
    shortfalls = (fixed @ draws.T / n).max(0) - own @ draws.T / n
    order = np.argsort(shortfalls)
    return fixed.mean(1).max() - own.mean(), n, (shortfalls[order], np.cumsum([0, *probabilities[order]]))


def table(sets: Mapping[str, Values]) -> str:
    """A table of the norms that all ``sets`` have, in ascending order of regret."""
    norms = [norm for norm in next(iter(sets.values())) if all(norm in values for values in sets.values())]
    rows = sorted((regret(norm, sets) for norm in norms), key=lambda row: row.regret)
    lines = [
        [
            row.norm,
            *(f"{row.shortfalls[name]:.2f}, {number_of_seeds(row.seeds[name])}" for name in sets),
            f"{row.regret:.2f} ({row.low:.2f} to {row.high:.2f})",
        ]
        for row in rows
    ]
    return markdown(lines, ["norm", *(f"shortfall on {name}" for name in sets), "regret (95 % interval)"])
