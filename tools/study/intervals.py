"""The 95 % interval of a mean over seeds, by Student's t."""

import statistics
from collections.abc import Sequence

from scipy import stats


def half_width(error: float, count: int) -> float:
    """Half the width of the interval of a mean over ``count`` values, 2 or more, with the standard error ``error``."""
    return float(stats.t.ppf(0.975, count - 1)) * error


def half_interval(values: Sequence[float]) -> float | None:
    """Half the width of the interval of the mean of ``values``. None for a single value."""
    if len(values) < 2:
        return None
    return half_width(statistics.stdev(values) / len(values) ** 0.5, len(values))


def mean_with_interval(values: Sequence[float], sign: str = "") -> str:
    """The mean over seeds with its interval, for instance "67.2 ± 1.3"; a dash if a value is missing."""
    if not values or None in values:
        return "-"
    half, mean = half_interval(values), f"{statistics.fmean(values):{sign}.1f}"
    return mean if half is None else f"{mean} ± {half:.1f}"


def number_of_seeds(count: int) -> str:
    """For instance "1 seed", "3 seeds"."""
    return f"{count} seed{'s' * (count != 1)}"
