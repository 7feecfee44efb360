import pytest

from study.rows import read_rows
from study.table2 import Table2Row, measure


def test_gains_against_the_papers_samples():
    rows = measure()
    assert len(rows) == 33
    assert {(r.activation, r.sigma) for r in rows} >= {("relu", 0.1), ("logsigmoid", 10)}
    for row in rows:
        for ours, paper in (
            (row.forward_gain, row.paper_forward_gain),
            (row.backward_gain, row.paper_backward_gain),
        ):
            assert ours == pytest.approx(paper, rel=1.2e-3, abs=1.1e-3)


def test_the_tool(reproduce, line_of, tmp_path):
    out = reproduce("table2", "--json", tmp_path / "rows.json")
    assert read_rows(tmp_path / "rows.json", Table2Row) == measure()
    assert line_of(out, "sigmoid      | 0.1") == ["sigmoid", "0.1", "25.062", "25.079", "0.062", "0.062"]
