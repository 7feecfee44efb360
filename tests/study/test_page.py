"""docs/results.md says what docs/results holds."""

from statistics import mean, stdev

from gng_d2.files import read_rows
from study import page as make_results


def test_page_is_up_to_date():
    with open("docs/results.md") as file:
        assert file.read() == make_results.page(), "run `make results`"


def test_table_3_is_computed_from_the_runs():
    rows = read_rows("docs/results/mlp_mnist.json")
    errors = [row["test_error"] for row in rows if row["num_groups"] == 64]
    line = next(line for line in make_results.table_3(rows).splitlines() if "64 (practical)" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:5] == [
        "1.670",
        f"{mean(errors):.3f}",
        f"{stdev(errors):.3f}",
        str(len(errors)),
    ]


def test_what_was_not_measured_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(make_results, "RESULTS", str(tmp_path))
    page = make_results.page()
    assert page.count("Not measured. The command:") == page.count("\n## ") + page.count("small, for a CPU") - 1
    assert "AMD" not in page and "±" not in page
