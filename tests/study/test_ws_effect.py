"""The table of what weight standardization changes, compared with numbers computed by hand."""

from study.ws_effect import table

PLAIN = {"GN1": {0: 29.0, 1: 30.0, 2: 31.0, 3: 99.0}, "GN/1": {0: 32.0, 1: 32.0, 2: 32.0, 3: 0.0}}
WITH_WS = {"GN1+WS": {0: 33.0, 1: 33.0, 2: 33.0}, "GN/1+WS": {0: 32.0, 1: 32.0, 2: 32.0}}


def test_change_is_of_the_seeds_that_both_have(line_of):
    cells = line_of(table({"CamVid": (PLAIN, WITH_WS)}), "CamVid")
    assert cells == [
        "CamVid",
        "-2.00 (-4.48 to +0.48), 3 seeds",
        "+1.00 (+1.00 to +1.00), 3 seeds *",
        "+3.00 (+0.52 to +5.48), 3 seeds *",
    ]


def test_a_single_seed_has_no_interval(line_of):
    one = {norm: {0: of_seed[0]} for norm, of_seed in WITH_WS.items()}
    assert line_of(table({"CamVid": (PLAIN, one)}), "CamVid")[1:] == ["-3.00, 1 seed", "+1.00, 1 seed", "+4.00, 1 seed"]


def test_what_was_not_measured_says_so(line_of):
    assert line_of(table({"BCCD": ({}, WITH_WS)}), "BCCD") == [
        "BCCD", "not measured", "+1.00 (+1.00 to +1.00), 3 seeds *", "not measured"
    ]  # fmt: skip
