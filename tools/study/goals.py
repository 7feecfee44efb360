"""What our kernels are to reach, and whether they do: each goal from the rows of norm-cost or step-cost."""

import math
from dataclasses import dataclass
from itertools import groupby
from statistics import geometric_mean

import torch

from .norm_cost import NormCostRow
from .rows import markdown

_LARGE = 64e6  # bytes
_LEARNED = 1.15


@dataclass(frozen=True)
class Goal:
    """A goal, and what a run says about it."""

    goal: str
    reached: str | None  # None: not measured
    met: bool | None = None  # None of what is only reported


def norm_goals(rows: list[NormCostRow]) -> list[Goal]:
    """Those of the norms alone, from the rows of one run of norm-cost."""
    alone = [row for row in rows if row.after == "nothing"]
    return [no_slower_than_gn32(alone), five_times_at_one_group(alone), share_of_copy_bandwidth(alone)]


def learned_goals(rows: list[NormCostRow]) -> list[Goal]:
    """Those of the norm that learns its groups, from the rows of norm-cost. The sum over the inputs is what counts."""
    goals = []
    for direction in ("forward", "forward+backward"):
        goal = f"LGN to PyTorch's GN at G = 32, {direction}: {_LEARNED} times at most"
        learned = [row for row in rows if (row.implementation, row.direction) == ("learned", direction)]
        if not learned:
            goals.append(Goal(goal, None))
            continue
        native = sum(row.milliseconds / row.ratio_to_native_gn32 for row in learned)
        ratio = sum(row.milliseconds for row in learned) / native
        worst = max(learned, key=lambda row: row.ratio_to_native_gn32)
        highest = f"{worst.ratio_to_native_gn32:.2f} at most ({_named(worst)})"
        text = f"{ratio:.2f} in the sum over {len(learned)} inputs, {highest}"
        goals.append(Goal(goal, text, ratio <= _LEARNED))
    return goals


def fused_goals(rows: list[NormCostRow]) -> list[Goal]:
    """Those of a norm in one op with what follows it, forward and backward, from the rows of norm-cost --after."""
    both = [row for row in rows if row.direction == "forward+backward"]
    large, small = ([row for row in both if (_bytes(row) >= 2**20) == is_large] for is_large in (True, False))
    goals = []
    for after, name, most in (("relu", "ReLU", 0.75), ("add_relu", "addition, ReLU", 0.8)):
        for other, theirs, limit in (
            ("ours", "our norm and these", most),
            ("frozen_bn", "Detectron2's FrozenBN and these", 0.9),
            ("frozen_bn_one_pass", "a FrozenBN of one pass and these", None),
        ):
            goals.append(_fused_to(large, after, other, f"norm, {name} in one op, to {theirs}, from 1 MB on", limit))
        goals.append(
            fused_no_slower(small, after, f"norm, {name} in one op no slower than in ops of their own, below 1 MB")
        )
    return goals


def _fused_to(rows, after, other, goal, limit):
    """The geometric mean over the inputs is what counts."""
    goal += "" if limit is None else f": {limit} times at most"
    pairs = _pairs(rows, after, other)
    if not pairs:
        return Goal(goal, None)
    ratios = [fused.milliseconds / row.milliseconds for fused, row in pairs]
    highest, mean = max(zip(ratios, (_named(fused) for fused, _ in pairs))), geometric_mean(ratios)
    text = f"{mean:.2f} in the geometric mean over {len(ratios)}, {highest[0]:.2f} at most ({highest[1]})"
    if limit is not None and mean > limit:
        text += f"; missed by {mean / limit - 1:.1%}"
    return Goal(goal, text, None if limit is None else mean <= limit)


def _pairs(rows, after, other):
    """The row of `fused` and that of another implementation of each input that has both."""
    others = {row.input(): row for row in rows if (row.after, row.implementation) == (after, other)}
    fused = [row for row in rows if (row.after, row.implementation) == (after, "fused") and row.input() in others]
    return [(row, others[row.input()]) for row in fused]


# over the tensor, forward and backward, with relu; an addition makes three more
_PASSES = {"fused": 8, "ours": 13, "frozen_bn": 11, "frozen_bn_one_pass": 9}


def what_bounds(rows: list[NormCostRow]) -> str:
    """What makes each ratio of :func:`fused_goals`: the passes over the data, and their speed beside a copy's."""
    large = [row for row in rows if row.direction == "forward+backward" and _bytes(row) >= 2**20]
    lines = []
    for after, name in (("relu", "ReLU"), ("add_relu", "addition, ReLU")):
        for other in ("ours", "frozen_bn", "frozen_bn_one_pass"):
            pairs = _pairs(large, after, other)
            if pairs:
                passes, theirs = (_PASSES[which] + 3 * (after == "add_relu") for which in ("fused", other))
                of_copy = geometric_mean(fused.fraction_of_copy_bandwidth for fused, _ in pairs)
                their_part = geometric_mean(row.fraction_of_copy_bandwidth for _, row in pairs) * theirs / passes
                measured = passes / theirs * their_part / of_copy
                lines.append([name, other, f"{passes} / {theirs}", passes / theirs, of_copy, their_part, measured])
    if not lines:
        return ""
    row = next(row for row in large if row.implementation == "fused")
    moved = (8 + 3 * (row.after == "add_relu")) * _bytes(row) / row.fraction_of_copy_bandwidth / row.milliseconds / 1e6
    headers = ["after the norm", "fused to", "passes", "bound", "fused, of a copy", "other, of a copy", "measured"]
    return (
        f"What bounds these ratios: a copy moves {moved:.1f} GB/s here. If each op moved its data as fast, the ratio\n"
        "of times would be that of the passes over the data. Where a speed is above that of a copy, part of the data\n"
        f"was in the caches. Geometric means, from 1 MB on:\n\n{markdown(lines, headers, '.2f')}"
    )


def fused_no_slower(rows: list[NormCostRow], after: str, goal: str) -> Goal:
    """Slower is an input on which it takes longer in three quarters of the rounds or more."""
    pairs = _pairs(rows, after, "ours")
    slower = [
        (fused.milliseconds / ours.milliseconds, fused) for fused, ours in pairs if fused.quartiles_to_ours[0] > 1
    ]
    text = f"{len(slower)} of {len(pairs)} slower" if pairs else None
    if slower:
        ratio, row = max(slower, key=lambda pair: pair[0])
        text += f", by {ratio - 1:.1%} at most ({_named(row)})"
    return Goal(goal, text, not slower if pairs else None)


def step_goals(rows: list) -> list[Goal]:
    """Those of training steps, from the rows of one run of step-cost."""
    return [
        no_slower_step(rows, "PGN+WS"),
        no_slower_step(rows, "PGN"),
        ratio_to_frozen_bn(rows),
        recomputed_step(rows),
        peak_memory(rows, amp=False),
        peak_memory(rows, amp=True),
    ]


def no_slower_than_gn32(rows: list[NormCostRow]) -> Goal:
    """Slower is an input on which ours takes longer than PyTorch's GN-32 in three quarters of the rounds or more."""
    ours = [row for row in rows if row.implementation == "ours" and row.ratio_quartiles]
    slower = [row for row in ours if row.ratio_quartiles[0] > 1]
    reached = f"{len(slower)} of {len(ours)} slower" if ours else None
    if slower:
        worst = max(slower, key=lambda row: row.ratio_to_native_gn32)
        reached += f", by {worst.ratio_to_native_gn32 - 1:.0%} at most ({_named(worst)})"
    goal = "on no input slower than PyTorch's GN at G = 32, beyond the noise of the rounds"
    return Goal(goal, reached, not slower if ours else None)


def five_times_at_one_group(rows: list[NormCostRow]) -> Goal:
    """Stride 4 is that of the second-largest maps: only the stem's are larger."""
    maps = [row for row in rows if row.shape[0] == 2 and row.num_groups == 1 and row.direction == "forward"]
    stride_4 = math.ceil(max((row.shape[2] for row in maps), default=0) / 2)
    maps = [row for row in maps if row.shape[2] == stride_4]
    native = {row.input(): row.milliseconds for row in maps if row.implementation == "native"}
    times = [
        (native[row.input()] / row.milliseconds, row)
        for row in maps
        if row.implementation == "ours" and row.input() in native
    ]
    goal = "forward 5 times as fast as PyTorch's at G = 1, 2 images, stride 4"
    if not times:
        return Goal(goal, None)
    least, row = min(times, key=lambda pair: pair[0])
    return Goal(goal, f"{least:.1f} times at least, of {len(times)} ({_named(row)})", least >= 5)


def share_of_copy_bandwidth(rows: list[NormCostRow]) -> Goal:
    """A row's own fraction counts 8 passes, or 6 where the tensor fits into L2."""
    large = [
        row
        for row in rows
        if row.implementation == "ours" and row.direction == "forward+backward" and _bytes(row) > _LARGE
    ]
    goal = "forward and backward at 75 % of the bandwidth of a copy, above 64 MB"
    if not large:
        return Goal(goal, None)
    least = min(large, key=lambda row: row.fraction_of_copy_bandwidth)
    share = least.fraction_of_copy_bandwidth
    return Goal(goal, f"{share:.0%} at least, of {len(large)} ({_named(least)})", share >= 0.75)


def no_slower_step(rows: list, norm: str) -> Goal:
    """Slower is a step that takes longer than that with PyTorch's ops in three quarters of the rounds or more."""
    pytorch = "GN+WS" if norm.endswith("+WS") else "GN"
    goal = f"a training step with {norm} no slower than with {pytorch} in PyTorch's ops"
    found = []
    for setups in _tables(rows):
        ours, theirs = setups.get((norm, True)), setups.get((pytorch, False))
        if ours and theirs and ours.quartiles_to_pytorch:
            found.append((ours.step_milliseconds / theirs.step_milliseconds, ours))
    if not found:
        return Goal(goal, None)
    slower = [row for _, row in found if row.quartiles_to_pytorch[0] > 1]
    highest, row = max(found, key=lambda pair: pair[0])
    text = f"{len(slower)} of {len(found)} slower; {highest:.2f} times at most ({_step(row)})"
    return Goal(goal, text, not slower)


def ratio_to_frozen_bn(rows: list) -> Goal:
    """Both have the same heads, and the same norm in the semantic one's place; FrozenBN's FPN has none."""
    found = [row for row in rows if row.norm == "PGN+WS" and not row.recomputed]
    ratios = [f"{row.ratio_to_frozen_bn:.2f} ({_step(row)})" for row in found]
    goal = "a step with PGN+WS and fuse_norms at most 1.10 times one with FrozenBN and the same head"
    fused = [row.ratio_to_frozen_bn for row in found if row.fused]
    return Goal(goal, ", ".join(ratios) or None, max(fused) <= 1.1 if fused else None)


def recomputed_step(rows: list) -> Goal:
    """The median over the rounds; whether both run fuse_norms or neither does."""
    goal = "a step with recompute_norms at most 1.03 times one without"
    found = [row for row in rows if row.recomputed]
    ratios = [
        f"{row.ratio_to_kept:.3f}{f', missed by {row.ratio_to_kept / 1.03 - 1:.1%}' * (row.ratio_to_kept > 1.03)} "
        f"({row.norm}, {_step(row)})"
        for row in found
    ]
    return Goal(goal, "; ".join(ratios) or None, all(row.ratio_to_kept <= 1.03 for row in found) if found else None)


def peak_memory(rows: list, amp: bool) -> Goal:
    """Of PGN to PyTorch's GN and of PGN+WS to PyTorch's GN+WS; to a thousandth, as an allocator rounds."""
    goal = f"peak memory {'under AMP lower' if amp else 'no higher'} than with PyTorch's GN, with WS and without"
    found = []
    for setups in _tables([row for row in rows if row.amp == amp]):
        for norm, pytorch in (("PGN", "GN"), ("PGN+WS", "GN+WS")):
            ours, theirs = setups.get((norm, True)), setups.get((pytorch, False))
            if ours and theirs and ours.peak_memory_bytes and theirs.peak_memory_bytes:
                found.append((ours.peak_memory_bytes / theirs.peak_memory_bytes, ours))
    if not found:
        return Goal(goal, None)
    highest, row = max(found, key=lambda pair: pair[0])
    met = highest < 0.999 if amp else highest <= 1.001
    return Goal(goal, f"{highest:.3f} times at most, of {len(found)} ({row.norm}, {_step(row)})", met)


def table(goals: list[Goal]) -> str:
    """A line for each goal: what was reached, and yes, no, not measured, or reported, where there is no goal."""
    lines = []
    for goal in goals:
        answer = "not measured" if goal.reached is None else {True: "yes", False: "no", None: "reported"}[goal.met]
        lines.append([goal.goal, goal.reached, answer])
    return markdown(lines, ["goal", "measured", "reached"])


def _tables(rows):
    """For each table of step-cost its rows that are neither fused nor recomputed, by (norm, kernels)."""
    ordered = sorted((row for row in rows if not (row.fused or row.recomputed)), key=lambda row: row.key())
    return [{(row.norm, row.kernels): row for row in group} for _, group in groupby(ordered, lambda row: row.key())]


def _named(row):
    return f"{'x'.join(map(str, row.shape))}, G = {row.num_groups}, {row.dtype}, {row.layout}, {row.direction}"


def _step(row):
    return f"{row.model}, {'AMP' if row.amp else 'float32'}, {row.images} images" + ", fused" * row.fused


def _bytes(row):
    return math.prod(row.shape) * torch.empty(0, dtype=getattr(torch, row.dtype)).element_size()
