import pytest

from study import sweep
from study.rows import read_rows


def test_group_sizes_against_the_exact_formula():
    rows = sweep.measure(20, n_in=32, n_out=16)
    linear = {(r.equation, r.group_size): r for r in rows if r.layer == "linear"}
    assert {key: row.paper for key, row in linear.items()} == {
        ("B", 4): 2, ("B", 8): 1.5, ("B", 16): 1.25, ("D", 4): 1, ("D", 8): 0.75, ("D", 16): 0.625
    }  # fmt: skip
    assert [linear["B", size].exact for size in (4, 8, 16)] == pytest.approx([2, 6 / 5, 14 / 13])
    assert linear["B", 4].standard_error is None
    for size in (8, 16):
        row = linear["B", size]
        assert abs(row.empirical - row.exact) < 5 * row.standard_error < abs(row.paper - row.exact)
    convolutions = [r for r in rows if r.layer == "conv3x3"]
    sizes = {(r.map_size, r.group_size, r.num_groups) for r in convolutions}
    assert sizes == {(m, size, 16 // size) for m in (4, 8, 16) for size in (1, 2, 4, 8, 16)}
    assert {r.exact for r in convolutions} == {None}
    assert all(r.empirical < r.paper for r in convolutions if r.group_size <= 4)


def test_the_tool(monkeypatch, reproduce, line_of, tmp_path):
    monkeypatch.setattr(sweep, "LAYERS", {"linear": (1, 4, (1,), 64), "conv3x3": (3, 1, (2,), 128)})
    files = ["--json", tmp_path / "rows.json", "--plot", tmp_path / "plot.png"]
    out = reproduce("sweep", "--experiments", 20, *files)
    rows = read_rows(tmp_path / "rows.json", sweep.SweepRow)
    assert [(r.layer, r.group_size, r.equation) for r in rows] == [
        *(("linear", size, equation) for size in (64, 128) for equation in "BD"),
        *(("conv3x3", 128, equation) for equation in "BD"),
    ]
    measured = f"{rows[4].empirical:.3f} ± {rows[4].standard_error:.3f}"
    assert line_of(out, "conv3x3, 2x2") == ["conv3x3, 2x2", "128", "1", "1.031", "-", measured]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
