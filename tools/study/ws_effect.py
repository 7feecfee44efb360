"""Whether weight standardization (WS) decides between few and many groups: GN1 less GN/1 with it and without it."""

import statistics
from collections.abc import Mapping

from .intervals import half_interval
from .report import WS
from .rows import markdown


def table(sets: Mapping[str, tuple[Mapping, Mapping]]) -> str:
    """A line for each set of data.

    Args:
        sets: two results of :func:`study.regret.read_values` for each set of data, without weight standardization and
            with it. If both were measured, only the seeds that both have are taken. The norms may be called "GN1" or
            "GN1+WS" in either.
    """
    lines = []
    for name, halves in sets.items():
        without, with_ws = (_advantage({norm.removesuffix(WS): v for norm, v in half.items()}) for half in halves)
        both = sorted(without.keys() & with_ws.keys())
        halves = [[half[seed] for seed in (both or half)] for half in (without, with_ws)]
        lines.append([name, *map(_cell, halves), _cell([with_ws[seed] - without[seed] for seed in both])])
    return markdown(lines, ["GN1 - GN/1 on", "without WS", "with WS", "change"])


def _advantage(values):
    """By seed, how far G = 1 is ahead of instance norm."""
    few, many = values.get("GN1", {}), values.get("GN/1", {})
    return {seed: few[seed] - many[seed] for seed in few if seed in many}


def _cell(values):
    if not values:
        return "not measured"
    mean, half = statistics.fmean(values), half_interval(values)
    if half is None:
        return f"{mean:+.2f}, 1 seed"
    low, high = mean - half, mean + half
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}), {len(values)} seeds" + " *" * (low > 0 or high < 0)
