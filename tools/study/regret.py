"""One number for a choice: how far a norm is behind the best fixed number of groups where it is worst.

Its input is the JSON of finished comparisons, one set of data or more.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .report import ComparisonRow
from .rows import markdown, read_rows

__all__ = ["FIXED", "Regret", "read_values", "regret", "table"]

FIXED = ("GN", "GN1", "GN/16", "GN/1")  # what "the best fixed number of groups" is the best of
Values = Mapping[str, Mapping[int, float]]  # by norm and seed


@dataclass(frozen=True)
class Regret:
    norm: str
    shortfalls: dict[str, float]  # by set of data: the best mean of FIXED less the norm's
    regret: float  # the largest of them
    low: float  # the 95 % interval of the regret
    high: float


def read_values(results: str, names: Sequence[str], metric: str) -> dict[str, dict[int, float]]:
    """The values of ``metric`` by norm and seed, from the files NAME.json in ``results``; of those that are there."""
    values = {}
    for path in (os.path.join(results, f"{name}.json") for name in names):
        for row in read_rows(path, ComparisonRow) if os.path.exists(path) else ():
            if row.metric == metric:
                values.setdefault(row.norm, {}).update(zip(row.seeds, row.values))
    return values


def regret(norm: str, sets: Mapping[str, Values]) -> Regret:
    """The regret of ``norm`` over ``sets`` of data.

    The interval is a bootstrap: in each set seeds are drawn with replacement, the same ones for all norms, and the best
    of FIXED is chosen anew. All draws are taken, each once.
    """
    drawn = [_shortfalls(norm, values) for values in sets.values()]
    # a largest shortfall for each pair of draws, one from each set
    worst = np.max(np.meshgrid(*(draws for _, draws in drawn)), axis=0)
    low, high = np.quantile(worst, [0.025, 0.975], method="inverted_cdf")
    shortfalls = {name: shortfall for name, (shortfall, _) in zip(sets, drawn)}
    return Regret(norm, shortfalls, max(shortfalls.values()), float(low), float(high))


def _shortfalls(norm, values):
    """As measured, and for each draw of as many seeds as there are, of those that all norms have."""
    seeds = sorted(set.intersection(*(set(values[name]) for name in (*FIXED, norm))))
    fixed = np.array([[values[name][seed] for seed in seeds] for name in FIXED])
    own = np.array([values[norm][seed] for seed in seeds])
    draws = np.array(list(itertools.product(range(len(seeds)), repeat=len(seeds))))
    return fixed.mean(1).max() - own.mean(), fixed[:, draws].mean(2).max(0) - own[draws].mean(1)


def table(sets: Mapping[str, Values]) -> str:
    """The norms that all ``sets`` have, the smallest regret first."""
    norms = [norm for norm in next(iter(sets.values())) if all(norm in values for values in sets.values())]
    rows = sorted((regret(norm, sets) for norm in norms), key=lambda row: row.regret)
    lines = [
        [row.norm, *row.shortfalls.values(), f"{row.regret:.2f} ({row.low:.2f} to {row.high:.2f})"] for row in rows
    ]
    return markdown(lines, ["norm", *(f"shortfall on {name}" for name in sets), "regret (95 % interval)"], ".2f")
