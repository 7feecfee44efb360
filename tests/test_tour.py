"""docs/tour.ipynb runs from its first cell to its last, and shows what it says."""

import json
from pathlib import Path

import matplotlib
import pytest


@pytest.mark.slow
def test_the_tour_runs(capsys, monkeypatch):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    cells = [cell for cell in json.loads(Path("docs/tour.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    try:
        for number, cell in enumerate(cells, 1):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        assert len(plt.get_fignums()) == 2
    finally:
        names.get("logging") and names["logging"].disable(0)
        plt.close("all")
    trained, fresh, calibrated = (names["accuracy"](names[name]) for name in ("trained", "fresh", "calibrated"))
    assert trained > 90 and calibrated > fresh + 10
    assert names["after"] < names["before"]
    assert "channels a group" in capsys.readouterr().out
