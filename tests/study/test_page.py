"""docs/results.md says what docs/results holds, and its prose says what the tables say."""

import json
import re
import shutil
from dataclasses import MISSING, fields, replace
from pathlib import Path
from statistics import mean, median, stdev

import pytest

from gng_d2.errors import InputError
from study import page as pages
from study import report
from study.gradients import UNIT_BLOCK
from study.paper import TABLE_3
from study.report import difference_interval
from study.rows import read_rows, write_rows

RESULTS = sorted(path.stem for path in Path("docs/results").glob("*.json"))


def rows_of(name):
    return read_rows(f"docs/results/{name}.json", pages.SECTIONS[name].row_type)


def test_page_is_up_to_date():
    assert Path("docs/results.md").read_text() == pages.page(), "run `make results`"
    for path in Path("docs").glob("*.md"):
        assert path.read_text() == pages.with_tables(path.read_text()), f"{path}: run `make results`"


def test_tables_of_other_pages_are_those_of_the_measurements():
    end = "<!-- end of table -->"
    text = f"a\n<!-- table of theory_table2 -->\nold\n{end}\nb <!-- table of classifier_caltech101 -->{end}"
    filled = pages.with_tables(text)
    assert pages.SECTIONS["theory_table2"].table(rows_of("theory_table2")) in filled and "old" not in filled
    assert filled.count("Not measured.") == 1 and filled.startswith("a\n<!-- table of theory_table2 -->\n\n|")


@pytest.mark.parametrize("name", RESULTS)
def test_every_file_of_results_is_read_and_written_as_it_is(name, tmp_path):
    """Fields that are newer than a file have their defaults in its rows."""
    path = Path(f"docs/results/{name}.json")
    write_rows(tmp_path / "rows.json", rows_of(name))
    before, after = (json.loads(file.read_text()) for file in (path, tmp_path / "rows.json"))
    defaults = {
        f.name: json.loads(json.dumps(f.default))
        for f in fields(pages.SECTIONS[name].row_type)
        if f.default is not MISSING
    }
    assert len(before) == len(after)
    for there, here in zip(before, after):
        assert [*there.items()] == [(field, here[field]) for field in here if field in there]
        assert all(here[field] == defaults[field] for field in here if field not in there)


def test_the_template_names_every_section_once():
    names = re.findall(r"\{\{(\w+)\}\}", Path(pages.TEMPLATE).read_text())
    assert sorted(name for name in names if name in pages.SECTIONS) == sorted(pages.SECTIONS)
    assert set(names) == {*pages.SECTIONS, *pages.COMPUTED, *pages.NUMBERS}
    assert set(RESULTS) <= set(pages.SECTIONS)


def test_every_picture_is_there():
    for path in re.findall(r"!\[.+\]\((.+)\)", Path("docs/results.md").read_text()):
        assert Path("docs", path).is_file()


def test_no_measurement_is_typed_in_the_prose():
    text = Path(pages.TEMPLATE).read_text()
    assert not re.findall(r"±|(?<!\d)\d+\.\d{2}(?!\d)|\d of \d", text)


def test_norms_of_another_comparison_stand_first_and_are_the_baseline(tmp_path, line_of):
    section = pages.SECTIONS["camvid_mixtures"]
    results = Path("docs/results/camvid_semantic_fpn.json")
    shutil.copy(results, tmp_path)
    rows = [row for row in rows_of("camvid_semantic_fpn") if row.norm in ("PGN", "GN/16")]
    write_rows(tmp_path / "camvid_mixtures.json", rows)
    text = section.text("camvid_mixtures", str(tmp_path), "title")
    norms = re.findall(r"^\| (\S+) +\| +5 \|", text, re.MULTILINE)
    assert norms == ["GN", "GN/1", "PGN", "GN/16"]
    expected = report.table(rows_of("camvid_semantic_fpn"))
    for norm in ("GN/1", "PGN", "GN/16"):
        assert line_of(text, f"{norm} - GN") == line_of(expected, f"{norm} - GN")
    rows = [replace(row, seeds=row.seeds[:3], values=row.values[:3]) for row in rows]
    write_rows(tmp_path / "camvid_mixtures.json", rows)
    text = section.text("camvid_mixtures", str(tmp_path), "title")
    assert re.findall(r"^\| (\S+) +\| +3 \|", text, re.MULTILINE) == norms, "GN with the seeds of the others"


def test_table_3_is_computed_from_the_runs(line_of):
    errors = [row.test_error for row in rows_of("mlp_mnist") if row.num_groups == 64]
    cells = line_of(pages.page(), "64 (practical)")
    assert cells[1:5] == ["1.670", f"{mean(errors):.3f}", f"{stdev(errors):.3f}", str(len(errors))]


def test_what_was_not_measured_says_so(tmp_path):
    page = pages.page(str(tmp_path))
    assert page.count("Not measured. The command:\n\n    python tools/") == len(pages.SECTIONS)
    assert "AMD" not in page and "±" not in page


def test_a_damaged_measurement_is_named(tmp_path):
    shutil.copytree("docs/results", tmp_path / "results")
    (tmp_path / "results" / "mlp_mnist.json").write_text("[{}]")
    with pytest.raises(InputError, match="mlp_mnist.json holds no rows of study.mlp"):
        pages.page(str(tmp_path))


def test_the_tool(reproduce, tmp_path, capsys):
    before = Path("docs/results.md").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stopped:
        reproduce("page", "--help")
    assert stopped.value.code == 0
    reproduce("page", "--output", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == Path("docs/results.md").read_text()
    assert Path("docs/results.md").stat().st_mtime_ns == before


# what the prose says


def by_norm(name, metric):
    return {row.norm: row for row in rows_of(name) if row.metric == metric}


def test_the_small_detectors_disagree():
    pfpn, faster_rcnn = by_norm("quick_pfpn", "PQ"), by_norm("quick_faster_rcnn", "AP")
    assert max(pfpn, key=lambda norm: pfpn[norm].mean) == "PGN"
    low, high = difference_interval(pfpn["PGN"])
    assert low < 0 < high
    for norm in ("GN1", "PGN"):
        low, high = difference_interval(faster_rcnn[norm])
        assert high < 0 and faster_rcnn[norm].difference < -5


def test_the_mlp_has_its_lowest_loss_where_the_paper_says_and_its_lowest_error_elsewhere():
    rows = rows_of("mlp_mnist")
    loss = {g: mean(row.train_loss[-1] for row in rows if row.num_groups == g) for g in TABLE_3}
    error = {g: mean(row.test_error for row in rows if row.num_groups == g) for g in TABLE_3}
    assert min(loss, key=loss.get) == 64 != min(error, key=error.get)
    assert sorted(error, key=error.get)[-2:] == [256, 512]  # 512 features: groups of 2 and 1


def test_unit_blocks_pass_on_the_same_share_under_any_groups():
    rows = [row for row in rows_of("isometry_r50") if row.kind == UNIT_BLOCK]
    medians = [median(row.measured for row in rows if row.setup == setup) for setup in ("GN", "GN1", "PGN")]
    assert max(medians) / min(medians) < 1.02


def test_gn_has_the_smallest_regret_of_our_norms_and_the_numbers_are_those_of_choosing_g(line_of):
    table = pages.COMPUTED["regrets"]("docs/results")
    values = {norm: line_of(table, norm)[-1] for norm in ("GN", "PGN", "GN/16", "GN1", "GN/1")}
    assert re.findall(r"^\| (\S+)", table, re.MULTILINE)[1:5] == ["LGN", "MIX-shared", "MIX-fixed", "GN"]
    regrets = {norm: f"{float(cell.partition(' ')[0]):.1f}" for norm, cell in values.items()}
    choosing = " ".join(Path("docs/choosing-g.md").read_text().split())
    said = "`GN` {GN}, PGN {PGN}, `GN/16` {GN/16}, G = 1 {GN1} and `GN/1` {GN/1}.".format(**regrets)
    mixed = float(line_of(table, "MIX-fixed")[-1].partition(" ")[0])
    assert said in choosing and f"ahead of it by {mixed:.1f}, which is its regret" in choosing
    (low, high), *others = (map(float, re.findall(r"[\d.]+", cell)[1:]) for cell in values.values())
    assert high > max(low for low, _ in others), "the interval of GN overlaps each of the others'"
    (of_shared,) = re.findall(r"to ([\d.]+)\)", line_of(table, "MIX-shared")[-1])
    assert float(of_shared) > low, "overlaps GN's"
    *shortfalls, learned = line_of(table, "LGN")[1:]
    assert all(cell.startswith("-") for cell in shortfalls), "ahead of the best number of groups on both sets"
    assert 0 < float(learned.rpartition(" ")[2].rstrip(")")) < low, "above 0, but not to GN's"
    said = f"`LGN` has {learned.partition(' ')[0][:-1]}, which is below 0"
    assert said in choosing and learned.startswith("-")


def test_what_the_trained_norms_receive():
    """The third outcome that refutes the hypothesis on weight standardization, and what the mean over norms hides."""
    inner = {"sem_seg_head.p4.2.norm", "sem_seg_head.p5.2.norm", "sem_seg_head.p5.4.norm"}  # behind another such norm

    def shares(run, names=None):
        rows = [r for r in rows_of("camvid_collapse") if r.run == run and (r.name in names if names else r.under_test)]
        return [mean(row.constant for row in rows if row.seed == seed) for seed in range(3)]

    few, many = shares("GN1"), shares("GN/1")
    assert all(here < there for here, there in zip(few, many))
    assert abs(mean(shares("GN1+WS")) - mean(few)) < stdev(few)
    outer = {row.name for row in rows_of("camvid_collapse") if row.under_test} - inner
    assert len(outer) == 4 and max(shares("GN1", outer)) < min(shares("GN/1", outer))
    for ws in ("", "+WS"):
        assert all(a > b for a, b in zip(shares(f"GN1{ws}", inner), shares(f"GN/1{ws}", inner)))
    assert mean(shares("GN1+WS", inner)) > 0.9 * mean(shares("GN1", inner)), "not prevented"


def test_constant_channels_are_not_what_costs_ap_in_a_detector():
    def shares(run, part=""):
        rows = [row for row in rows_of("bccd_collapse") if row.run == run and row.under_test and part in row.name]
        return [mean(row.constant for row in rows if row.seed == seed) for seed in range(3)]

    assert all(few > 2 * many for few, many in zip(shares("GN1"), shares("GN/1")))
    assert all(some >= few for some, few in zip(shares("GN"), shares("GN1"))), "as large"
    ap = {row.norm: row.mean for row in rows_of("bccd_plain") if row.metric == "AP"}
    assert ap["GN"] > max(ap["GN1"], ap["GN/1"])
    for run in ("GN", "GN1"):
        assert all(a < b < c for a, b, c in zip(*(shares(run, f"res{stage}") for stage in (3, 4, 5))))


def test_little_is_measured_in_convolutions_where_the_formula_sees_much():
    rows = [row for row in rows_of("theory_sweep") if row.equation == "B" and row.layer == "conv3x3"]
    assert max(row.paper for row in rows) == 5 and max(row.empirical for row in rows) < 1.5
