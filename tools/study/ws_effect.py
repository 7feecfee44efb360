"""Whether weight standardization (WS) decides between few and many groups: GN1 less GN/1 with it and without it.

Its input is what :func:`study.regret.read_values` reads.
"""

import statistics
from collections.abc import Mapping

from scipy import stats

from .report import WS
from .rows import markdown

__all__ = ["advantage", "interval", "table"]


def advantage(values: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """By seed, how far G = 1 is ahead of instance norm."""
    few, many = values.get("GN1", {}), values.get("GN/1", {})
    return {seed: few[seed] - many[seed] for seed in few if seed in many}


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval, by Student's t, of two values or more."""
    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def table(sets: Mapping[str, tuple[Mapping, Mapping]]) -> str:
    """A line for each set of data, from its values without weight standardization and with it, of the seeds that both
    have where both were measured. A "+WS" in the names of the norms is left away."""
    lines = []
    for name, halves in sets.items():
        without, with_ws = (advantage({norm.removesuffix(WS): v for norm, v in half.items()}) for half in halves)
        both = sorted(without.keys() & with_ws.keys())
        halves = [[half[seed] for seed in (both or half)] for half in (without, with_ws)]
        lines.append([name, *map(_cell, halves), _cell([with_ws[seed] - without[seed] for seed in both])])
    return markdown(lines, ["GN1 - GN/1 on", "without WS", "with WS", "change"])


def _cell(values):
    if not values:
        return "not measured"
    if len(values) == 1:
        return f"{values[0]:+.2f}, 1 seed"
    mean, low, high = interval(values)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}), {len(values)} seeds" + " *" * (low > 0 or high < 0)
