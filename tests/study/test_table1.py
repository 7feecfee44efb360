import pytest

from study.paper import TABLE_1
from study.rows import machine, read_rows
from study.table1 import Table1Row, measure

SMALL = (128, 64, 16)


def test_a_block_against_the_paper_and_the_exact_formulas(monkeypatch):
    monkeypatch.setattr("study.table1.TABLE_1", {SMALL: TABLE_1[SMALL]})
    rows = measure(400)
    assert [(r.equation, r.paper_empirical, r.theoretical, r.exact) for r in rows] == [
        ("A", 63.185, 64, 63.5), ("B", 1.900, 2, 2), ("C", 0.500, 0.5, 0.5), ("D", 0.992, 1, 127 / 128)
    ]  # fmt: skip
    for row in rows:
        assert (row.n_in, row.n_out, row.num_groups) == SMALL and row.machine == machine()
        assert row.low < row.empirical < row.high
        assert row.empirical == pytest.approx(row.exact, rel=0.005 if row.equation in "AC" else 0.1)
    a = rows[0]
    assert (a.high + a.low) / 2 == pytest.approx(a.empirical)
    assert abs(a.empirical - a.exact) < 2.5 * (a.high - a.low) / 2


def test_the_tool(monkeypatch, reproduce, line_of, tmp_path):
    monkeypatch.setattr("study.table1.TABLE_1", {(16, 8, 2): TABLE_1[SMALL]})
    out = reproduce("table1", "--experiments", 20, "--seed", 3, "--json", tmp_path / "rows.json")
    rows = read_rows(tmp_path / "rows.json", Table1Row)
    assert rows == measure(20, seed=3) and rows != measure(20, seed=4)
    assert line_of(out, "16 -> 8, G = 2 | A")[2:] == [
        "63.185",
        f"{rows[0].empirical:.3f} ({rows[0].low:.3f} to {rows[0].high:.3f})",
        "8.000",
        "7.500",
    ]


@pytest.mark.parametrize("experiment", ["table1", "sweep"])
def test_too_few_experiments_are_refused(reproduce, experiment):
    with pytest.raises(SystemExit, match="error: --experiments 19: at least 20, one for each repeat"):
        reproduce(experiment, "--experiments", 19)
