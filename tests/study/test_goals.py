"""Goals and rule, on rows whose answers are known."""

from dataclasses import replace

import pytest

from study import goals, rule
from study.norm_cost import NormCostRow
from study.step_cost import StepCostRow

NORM = NormCostRow(
    [2, 256, 200, 304], 1, "float32", "contiguous", "forward", "ours", 1.0, 0.5, 0.8, "a GPU", [0.4, 0.6], True
)
BOTH = replace(NORM, direction="forward+backward")
STEP = StepCostRow("pfpn", "PGN+WS", False, 2, [800, 1216], 100.0, 1.25, 0.9, 1000, 1.0, 0.1, "a GPU", True, [0.8, 0.9])


def pytorch(row, **changed):
    return replace(row, norm=row.norm.replace("PGN", "GN"), kernels=False, quartiles_to_pytorch=[1.0, 1.0], **changed)


@pytest.mark.parametrize(
    "quartiles, met", [([0.9, 0.99], True), ([0.99, 1.5], True), ([1.0, 1.2], True), ([1.01, 1.2], False)]
)
def test_slower_than_gn32_is_what_three_quarters_of_the_rounds_say(quartiles, met):
    other = replace(NORM, shape=[2, 64, 25, 38], ratio_to_native_gn32=1.11, ratio_quartiles=quartiles)
    theirs = replace(NORM, implementation="native", ratio_quartiles=[2.0, 3.0])
    goal = goals.no_slower_than_gn32([NORM, theirs, other])
    assert goal.met is met and goal.reached.startswith(f"{int(not met)} of 2 slower")
    assert ("by 11% at most (2x64x25x38" in goal.reached) is not met


def test_five_times_pytorchs_at_stride_4_with_two_images():
    def pair(shape, ours, theirs, num_groups=1):
        row = replace(NORM, shape=shape, num_groups=num_groups, milliseconds=ours)
        return [row, replace(row, implementation="native", milliseconds=theirs)]

    stem = pair([2, 64, 400, 608], 1.0, 2.0)
    others = [*pair([2, 256, 100, 152], 1.0, 1.0), *pair([1, 256, 200, 304], 1.0, 1.0)]
    groups = pair([2, 64, 200, 304], 1.0, 1.0, num_groups=64)
    rows = [*stem, *others, *groups, *pair([2, 256, 200, 304], 1.0, 8.0), *pair([2, 64, 200, 304], 1.0, 6.0)]
    goal = goals.five_times_at_one_group(rows)
    assert goal.met and goal.reached.startswith("6.0 times at least, of 2 (2x64x200x304")
    slow = pair([2, 128, 200, 304], 1.0, 4.9)
    assert goals.five_times_at_one_group([*rows, *slow]).met is False
    assert goals.five_times_at_one_group([*stem, *others, *groups]).reached is None


def test_share_of_copy_bandwidth_above_64_mb():
    small = replace(BOTH, shape=[2, 128, 200, 304], fraction_of_copy_bandwidth=0.1)  # 62 MB
    half = replace(BOTH, dtype="float16", fraction_of_copy_bandwidth=0.1)  # 62 MB
    forward = replace(NORM, fraction_of_copy_bandwidth=0.1)
    theirs = replace(BOTH, implementation="native", fraction_of_copy_bandwidth=0.1)
    rest = [small, half, forward, theirs]
    goal = goals.share_of_copy_bandwidth([BOTH, *rest])
    assert goal.met and goal.reached.startswith("80% at least, of 1 (")
    assert goals.share_of_copy_bandwidth([replace(BOTH, fraction_of_copy_bandwidth=0.74), BOTH]).met is False
    assert goals.share_of_copy_bandwidth(rest) == replace(goal, reached=None, met=None)


@pytest.mark.parametrize("norm", ["PGN", "PGN+WS"])
def test_a_step_is_held_against_pytorchs_ops_in_its_own_table(norm):
    row = replace(STEP, norm=norm)
    theirs = pytorch(row, step_milliseconds=125.0)
    amp, their_amp = (replace(r, amp=True, step_milliseconds=50.0) for r in (row, theirs))
    goal = goals.no_slower_step([theirs, their_amp, row, amp], norm)
    assert goal.met and goal.reached == "0 of 2 slower; 1.00 times at most (pfpn, AMP, 2 images)"
    slower = replace(amp, quartiles_to_pytorch=[1.01, 1.1])
    goal = goals.no_slower_step([theirs, their_amp, row, slower], norm)
    assert goal.met is False and goal.reached.startswith("1 of 2 slower")
    assert goals.no_slower_step([row, replace(theirs, kernels=True)], norm).reached is None


def test_of_the_norm_that_learns_its_groups_the_sum_over_the_inputs_counts():
    large = replace(NORM, implementation="learned", milliseconds=1.0, ratio_to_native_gn32=1.0)
    small = replace(large, shape=[1, 64, 25, 38], milliseconds=0.3, ratio_to_native_gn32=3.0)
    forward, both = goals.learned_goals([NORM, large, small])
    assert forward.met is False
    assert forward.reached.startswith("1.18 in the sum over 2 inputs, 3.00 at most (1x64x25x38")
    assert goals.learned_goals([replace(large, direction="forward+backward")])[1].met
    assert both.reached is None and both.met is None


def test_a_fused_step_is_held_against_frozen_bn():
    goal = goals.ratio_to_frozen_bn([STEP, replace(STEP, norm="PGN", ratio_to_frozen_bn=9.0)])
    assert (goal.reached, goal.met) == ("1.25 (pfpn, float32, 2 images)", None)
    fused = replace(STEP, ratio_to_frozen_bn=1.125, fused=True, quartiles_to_pytorch=[2.0, 2.0])
    recomputed = replace(fused, ratio_to_frozen_bn=9.0, recomputed=True, ratio_to_kept=1.5)
    goal = goals.ratio_to_frozen_bn([STEP, fused, recomputed])
    assert goal.reached == "1.25 (pfpn, float32, 2 images), 1.12 (pfpn, float32, 2 images, fused)"
    assert goal.met is False and goals.ratio_to_frozen_bn([replace(fused, ratio_to_frozen_bn=1.1)]).met
    rows = [STEP, pytorch(STEP)]
    assert goals.step_goals([*rows, fused, recomputed])[0] == goals.step_goals(rows)[0]


def test_recomputed_steps_are_held_against_those_without():
    assert goals.recomputed_step([STEP]).reached is None
    rows = [STEP, replace(STEP, recomputed=True, ratio_to_kept=1.0299)]
    assert goals.recomputed_step(rows) == replace(
        goals.recomputed_step([]), reached="1.030 (PGN+WS, pfpn, float32, 2 images)", met=True
    )
    goal = goals.recomputed_step([*rows, replace(rows[1], fused=True, ratio_to_kept=1.1)])
    assert goal.met is False
    assert goal.reached.endswith("; 1.100, missed by 6.8% (PGN+WS, pfpn, float32, 2 images, fused)")


@pytest.mark.parametrize(
    "amp, theirs, met", [(False, 1000, True), (False, 990, False), (True, 1000, False), (True, 1010, True)]
)
def test_peak_memory(amp, theirs, met):
    row = replace(STEP, amp=amp)
    rows = [row, pytorch(row, peak_memory_bytes=theirs)]
    assert goals.peak_memory(rows, amp).met is met
    assert goals.peak_memory(rows, not amp).reached is None
    nowhere = [replace(r, peak_memory_bytes=None) for r in rows]  # on a CPU
    assert goals.peak_memory(nowhere, amp).reached is None


def with_relu(implementation, milliseconds, shape=BOTH.shape, quartiles=(0.5, 0.6)):
    changed = {"implementation": implementation, "milliseconds": milliseconds, "shape": list(shape)}
    return replace(BOTH, after="relu", quartiles_to_ours=list(quartiles), **changed)


def test_fused_norms_are_held_against_ops_of_their_own_and_frozen_ones():
    other = 1, 64, 200, 304
    rows = [
        *(with_relu("fused", 6.0), with_relu("ours", 10.0), with_relu("frozen_bn", 6.0)),
        *(with_relu("fused", 8.0, other), with_relu("ours", 10.0, other), with_relu("frozen_bn_one_pass", 4.0, other)),
        replace(with_relu("fused", 99.0, other), direction="forward"),
    ]
    to_ours, to_frozen, to_one_pass, small, *of_addition = goals.fused_goals(rows)
    assert to_ours.met and to_ours.reached.startswith("0.69 in the geometric mean over 2, 0.80 at most (1x64x200x304")
    assert to_frozen.met is False and to_frozen.reached.startswith("1.00 in the geometric mean over 1")
    assert to_frozen.reached.endswith("; missed by 11.1%") and "missed" not in to_ours.reached + to_one_pass.reached
    assert to_one_pass.met is None and to_one_pass.reached.startswith("2.00 ")
    assert all(goal.reached is None for goal in (small, *of_addition))
    sizes = (1, 64, 8, 8), (1, 64, 9, 9)
    ours = [with_relu("ours", 0.8, size) for size in sizes]
    maps = [with_relu("fused", 1.0, size, (first, 1.2)) for size, first in zip(sizes, (0.9, 1.01))]
    assert goals.fused_goals([*rows, maps[0], *ours])[3].reached == "0 of 1 slower"
    small = goals.fused_goals([*rows, *maps, *ours])[3]
    assert small.met is False
    assert small.reached == ("1 of 2 slower, by 25.0% at most (1x64x9x9, G = 1, float32, contiguous, forward+backward)")
    assert goals.norm_goals(rows) == goals.norm_goals([]) and rule.choices(rows) == []


def test_what_bounds_the_ratios(line_of):
    """Of 2.5 ms, fused took 2 for 8 passes that a copy does in 1; ours took 2.6 for its 13 passes."""
    fused, ours = (
        replace(with_relu(name, time), fraction_of_copy_bandwidth=1 / time)
        for name, time in (("fused", 2.0), ("ours", 2.6))
    )
    text = goals.what_bounds([fused, ours])
    assert line_of(text, "ReLU")[1:] == ["ours", "8 / 13", "0.62", "0.50", "0.62", "0.77"]
    megabytes = 8 * 2 * 256 * 200 * 304 * 4 / 1e6
    assert f"a copy moves {megabytes:.1f} GB/s here" in text
    assert goals.what_bounds([]) == goals.what_bounds([replace(fused, shape=[1, 64, 8, 8])]) == ""


def test_table_says_what_was_not_measured(line_of):
    table = goals.table(
        [goals.Goal("a", "1", True), goals.Goal("b", "2", False), goals.Goal("c", "3"), goals.Goal("d", None)]
    )
    assert [line_of(table, name)[1:] for name in "abcd"] == [
        ["1", "yes"], ["2", "no"], ["3", "reported"], ["-", "not measured"],
    ]  # fmt: skip
    assert goals.table(goals.norm_goals([]) + goals.step_goals([])).count("not measured") == 9


def measured(groups, kernels, theirs, chose, shape=(2, 64, 64, 64)):
    """The rows of an input."""
    times = {"ours": kernels if chose else theirs, "our_kernels": kernels, "native": theirs}
    row = replace(NORM, shape=list(shape), num_groups=groups)
    return [
        replace(row, implementation=name, milliseconds=time, kernels=chose if name == "ours" else None)
        for name, time in times.items()
    ]


def with_quartiles(rows, noise=0.01):
    return [replace(row, ratio_quartiles=[row.milliseconds - noise, row.milliseconds + noise]) for row in rows]


def test_where_the_rule_was_right():
    rows = with_quartiles(
        [
            *measured(1, 1.0, 2.0, chose=True),
            *measured(2, 1.0, 1.5, chose=False),
            *measured(4, 1.0, 1.015, chose=False),  # within the noise
            *measured(8, 2.0, 1.0, chose=True),
            *measured(64, 2.0, 1.0, chose=False),
        ]
    )
    found = rule.choices(rows)
    assert [(c.num_groups, c.right) for c in found] == [(1, True), (2, False), (4, None), (8, False), (64, True)]
    table = rule.table(rows)
    assert "the faster op on 2 of 5 inputs and the slower on 2;" in table
    assert table.index("| 2x64x64x64 |   8 |") < table.index("| 2x64x64x64 |   2 |")  # the greater loss first
    assert rule.table(rows[1:3]).endswith("not measured.")


def test_thresholds_that_lose_least():
    """Our kernels are faster below 16 thread blocks and from 2^12 elements a group on, and the rule chose never."""
    cases = [
        (1, (2, 64, 64, 64), True),
        (4, (2, 64, 64, 64), True),
        (8, (2, 64, 64, 64), False),  # 16 thread blocks
        (1, (2, 64, 8, 8), True),  # 4096 elements
        (1, (2, 64, 4, 4), False),
    ]
    rows = [
        row
        for groups, shape, ours in cases
        for row in measured(groups, *((1.0, 2.0) if ours else (2.0, 1.0)), chose=False, shape=shape)
    ]
    blocks, size, least, now = rule.best_thresholds(rule.choices(rows))
    assert (blocks, size, least) == (16, 4096, 1) and now == pytest.approx(2 ** (3 / 5))
    last_sentence = "where images x groups are below 16 and a group has 4096 elements or more would lose 0.0%."
    assert rule.table(rows).endswith(last_sentence)
    others = [replace(row, layout="channels_last") for row in rows]
    assert rule.best_thresholds(rule.choices(others)) is None
