import subprocess
import sys

import pytest

from gng_d2.files import read_rows
from study.paper import TABLE_1
from study.theory import sweep, table_1, table_2

TABLE_1_KEYS = ["n_in", "n_out", "num_groups", "equation", "paper_empirical", "empirical", "low", "high", "theoretical",
                "exact"]  # fmt: skip
TABLE_2_KEYS = ["activation", "sigma", "forward_gain", "backward_gain", "paper_forward_gain", "paper_backward_gain"]
SWEEP_KEYS = ["layer", "n_in", "n_out", "num_groups", "map_size", "group_size", "equation", "paper", "exact",
              "empirical", "standard_error"]  # fmt: skip


def test_table_1(monkeypatch):
    small = (128, 64, 16)
    monkeypatch.setattr("study.theory.TABLE_1", {small: TABLE_1[small]})
    rows = table_1(400)
    assert all(list(row) == TABLE_1_KEYS for row in rows)
    assert [(r["equation"], r["paper_empirical"], r["theoretical"], r["exact"]) for r in rows] == [
        ("A", 63.185, 64, 63.5), ("B", 1.900, 2, 2), ("C", 0.500, 0.5, 0.5), ("D", 0.992, 1, 127 / 128)
    ]  # fmt: skip
    for row in rows:
        assert row["low"] < row["empirical"] < row["high"]
        assert row["empirical"] == pytest.approx(row["exact"], rel=0.005 if row["equation"] in "AC" else 0.1)
    a = rows[0]
    assert (a["high"] + a["low"]) / 2 == pytest.approx(a["empirical"])
    assert abs(a["empirical"] - a["exact"]) < 2.5 * (a["high"] - a["low"]) / 2


def test_table_2():
    rows = table_2()
    assert all(list(row) == TABLE_2_KEYS for row in rows) and len(rows) == 33
    assert {(r["activation"], r["sigma"]) for r in rows} >= {("relu", 0.1), ("logsigmoid", 10)}
    for row in rows:
        for gain in ("forward_gain", "backward_gain"):
            assert row[gain] == pytest.approx(row[f"paper_{gain}"], rel=1.2e-3, abs=1.1e-3)


def test_sweep():
    rows = sweep(20, n_in=32, n_out=16)
    assert all(list(row) == SWEEP_KEYS for row in rows)
    linear = {(r["equation"], r["group_size"]): r for r in rows if r["layer"] == "linear"}
    assert {key: row["paper"] for key, row in linear.items()} == {
        ("B", 4): 2, ("B", 8): 1.5, ("B", 16): 1.25, ("D", 4): 1, ("D", 8): 0.75, ("D", 16): 0.625
    }  # fmt: skip
    assert [linear["B", size]["exact"] for size in (4, 8, 16)] == pytest.approx([2, 6 / 5, 14 / 13])
    assert linear["B", 4]["standard_error"] is None
    for size in (8, 16):
        row = linear["B", size]
        assert abs(row["empirical"] - row["exact"]) < 5 * row["standard_error"] < abs(row["paper"] - row["exact"])
    convolutions = [r for r in rows if r["layer"] == "conv3x3"]
    sizes = {(r["map_size"], r["group_size"], r["num_groups"]) for r in convolutions}
    assert sizes == {(m, size, 16 // size) for m in (4, 8, 16) for size in (1, 2, 4, 8, 16)}
    assert {r["exact"] for r in convolutions} == {None}
    assert all(r["empirical"] < r["paper"] for r in convolutions if r["group_size"] <= 4)


def test_tool(tmp_path):
    def run(*args):
        command = [sys.executable, "-W", "ignore", "tools/validate_theory.py", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("table2", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "rows.json")
    assert all("PyTorch" in row.pop("machine") for row in rows)
    assert all(row == pytest.approx(expected) for row, expected in zip(rows, table_2(), strict=True))
    done = run("sweep", "--experiments", 19)
    assert done.returncode == 1 and done.stderr.startswith("error: --experiments 19: at least 20")
