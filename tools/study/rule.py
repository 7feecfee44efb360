"""Whether the rule for which op is the faster one, ours or PyTorch's, chose right where both were measured."""

import math
from dataclasses import dataclass
from statistics import geometric_mean

from .norm_cost import NormCostRow
from .rows import markdown

_ANY = 2**31  # more thread blocks than there can be


@dataclass(frozen=True)
class Choice:
    """An input, the op that the rule chose for it, and the times of both."""

    shape: tuple[int, ...]
    num_groups: int
    dtype: str
    layout: str
    direction: str
    chose_kernels: bool
    kernels: float  # milliseconds
    pytorch: float
    apart: bool  # in the noise of the rounds

    @property
    def right(self) -> bool | None:
        """None where the two cannot be told apart."""
        return self.chose_kernels == (self.kernels < self.pytorch) if self.apart else None

    @property
    def thread_blocks(self) -> int:
        """Of PyTorch's op: one for each group of each image."""
        return self.shape[0] * self.num_groups

    @property
    def group_size(self) -> int:
        return math.prod(self.shape) // self.thread_blocks


def choices(rows: list[NormCostRow]) -> list[Choice]:
    """One for each input and direction with rows of `ours`, `our_kernels` and `native`, as norm-cost writes them."""
    inputs = {}
    for row in rows:
        if row.ratio_quartiles and row.after == "nothing":
            inputs.setdefault((*row.input(), row.direction), {})[row.implementation] = row
    found = []
    for key, by_name in inputs.items():
        if {"ours", "our_kernels", "native"} <= by_name.keys():
            kernels, pytorch = by_name["our_kernels"], by_name["native"]
            (low, high), (other_low, other_high) = kernels.ratio_quartiles, pytorch.ratio_quartiles
            apart = high < other_low or other_high < low
            found.append(Choice(*key, by_name["ours"].kernels, kernels.milliseconds, pytorch.milliseconds, apart))
    return found


def best_thresholds(found: list[Choice]) -> tuple[int, int, float, float] | None:
    """The constants of the rule in gng_d2/ops/group_norm_triton.py that lose least on these inputs.

    It takes our kernels where PyTorch's op has fewer thread blocks than the GPU has multiprocessors, and groups of
    ``_MIN_GROUP`` elements or more. Contiguous inputs alone: others are copied by PyTorch's op.

    Returns:
        Thread blocks from which on PyTorch's op is taken, elements of a group from which on our kernels are, and
        the time lost, as a ratio to that of the faster op on each input, by these and by the rule as it is. None if
        there are no such inputs.
    """
    found = [choice for choice in found if choice.layout == "contiguous"]
    if not found:
        return None

    def lost(takes_kernels):
        taken = [c.kernels if takes_kernels(c) else c.pytorch for c in found]
        return geometric_mean(time / min(c.kernels, c.pytorch) for time, c in zip(taken, found))

    def rule(blocks, size):
        return lambda c: c.thread_blocks < blocks and c.group_size >= size

    candidates = [
        (lost(rule(blocks, size)), blocks, size)
        for blocks in sorted({choice.thread_blocks for choice in found} | {_ANY})
        for size in sorted({choice.group_size for choice in found})
    ]
    least, blocks, size = min(candidates)
    return blocks, size, least, lost(lambda choice: choice.chose_kernels)


def table(rows: list[NormCostRow]) -> str:
    """How often the rule was right, where it was wrong, and which thresholds would lose least."""
    found = choices(rows)
    if not found:
        return "Whether the rule chooses the faster op: not measured."
    wrong = sorted((c for c in found if c.right is False), key=lambda c: -abs(math.log(c.kernels / c.pytorch)))
    right = sum(c.right is True for c in found)
    text = [
        f"The rule chose the faster op on {right} of {len(found)} inputs and the slower on {len(wrong)}; on the others "
        "the two cannot be told apart."
    ]
    if wrong:
        lines = [
            ["x".join(map(str, c.shape)), c.num_groups, c.dtype, c.layout, c.direction,
             "ours" if c.chose_kernels else "PyTorch's", c.kernels, c.pytorch]
            for c in wrong
        ]  # fmt: skip
        headers = ["input", "G", "dtype", "layout", "direction", "it chose", "our kernels, ms", "PyTorch's, ms"]
        text.append(markdown(lines, headers))
    best = best_thresholds(found)
    if best:
        blocks, size, least, now = best
        limit = "whatever images x groups are" if blocks == _ANY else f"where images x groups are below {blocks}"
        lost = f"On the contiguous inputs it loses {now - 1:.1%} against the faster op of each"
        other = f"our kernels {limit} and a group has {size} elements or more would lose {least - 1:.1%}"
        text.append(f"{lost}; {other}." if now - least > 1e-3 else f"{lost}; no other thresholds lose less.")
    return "\n\n".join(text)
