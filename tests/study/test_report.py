"""What the report of a comparison says."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from detectron2.evaluation.testing import flatten_results_dict

from gng_d2.errors import InputError
from study import report
from study.comparison import Comparison, Run, RunState, paper_values
from study.local import Local
from study.report import ComparisonRow, restore_runs, run_results, summarize, write_report
from study.rows import read_rows, write_rows
from study.watch import train_all


def test_statistics_are_those_by_hand():
    values = {
        "GN": {0: {"PQ": 40.0}, 1: {"PQ": 42.0}, 2: {"PQ": 44.0}},
        "PGN": {0: {"PQ": 41.0}, 1: {"PQ": 42.0}, 2: {"PQ": 47.0}, 3: {"PQ": 50.0}},
        "GN1": {2: {"PQ": 40.0}},
        "GN2": {0: {"PQ": None}, 1: {"PQ": 1.0}},
        "GN4": {},
    }
    gn, pgn, gn1, gn2, gn4 = summarize(values, {"GN": {"PQ": 41.75}})
    assert (gn.mean, gn.std, gn.seeds, gn.difference, gn.paper) == (42, 2, [0, 1, 2], None, 41.75)
    assert (pgn.mean, pgn.values) == (45, [41, 42, 47, 50])
    assert pgn.std == pytest.approx((54 / 3) ** 0.5)  # 16 + 9 + 4 + 25
    # 1, 0 and 3 for the common seeds: mean 4/3, variance (1/9 + 16/9 + 25/9) / 2 = 7/3, over three
    assert (pgn.difference, pgn.difference_seeds) == (pytest.approx(4 / 3), 3)
    assert pgn.difference_error == pytest.approx((7 / 9) ** 0.5)
    assert (gn1.mean, gn1.std, gn1.difference, gn1.difference_error) == (40, None, -4, None)
    assert (gn2.mean, gn2.difference, gn4.mean, gn4.difference) == (None, None, None, None)


@pytest.mark.parametrize("pairs, marked", [((1.0, 1.1, 1.2), True), ((0.2, 1.1, 2.0), False), ((1.0, 2.0), False)])
def test_a_difference_is_marked_where_the_seeds_do_not_explain_it(pairs, marked):
    """The standard errors are 0.06 and 0.52 with 2 degrees of freedom (t = 4.303), and 0.5 with 1 (t = 12.706)."""
    values = {"GN": {s: {"AP": 0.0} for s in range(len(pairs))}, "PGN": {s: {"AP": d} for s, d in enumerate(pairs)}}
    rows = summarize(values, {})
    (line,) = [line for line in report.table(rows).splitlines() if line.startswith("| PGN - GN ")]
    assert line.rstrip(" |").endswith("*") == marked
    low, high = report.difference_interval(rows[1])
    half = {(1.0, 1.1, 1.2): 0.1 / 3**0.5 * 4.3027, (0.2, 1.1, 2.0): 0.9 / 3**0.5 * 4.3027, (1.0, 2.0): 0.5 * 12.7062}[
        pairs
    ]
    assert ((high - low) / 2, (high + low) / 2) == (
        pytest.approx(half, rel=1e-4),
        pytest.approx(sum(pairs) / len(pairs)),
    )


def test_how_many_intervals_were_made_is_said():
    values = {norm: {0: {"AP": 0.0, "AP50": 1.0}, 1: {"AP": 1.0, "AP50": 2.0}} for norm in ("GN", "GN1", "PGN")}
    values["GN2"] = {0: {"AP": 0.0, "AP50": 1.0}}  # one seed: no interval
    rows = summarize(values, {})
    assert "4 comparisons were made here" in report.table(rows)
    assert "no interval" in report.table([row for row in rows if row.norm in ("GN", "GN2")])


@pytest.mark.slow
def test_the_report_of_finished_runs(job, tmp_path, small):
    comparison = small(["GN", "PGN", "GN3"], [0, 1, 2])
    list(train_all(Local(comparison)))
    text = write_report(comparison)
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        *(["norm", "seeds", "AP"], ["GN", "3", "41.00 ± 1.00"], ["PGN", "3", "42.00 ± 1.00"], ["GN3", "0", "-"]),
        *(["difference", "seeds", "AP"], ["PGN - GN", "3", "+1.00 (+1.00 to +1.00) *"], ["GN3 - GN", "0", "-"]),
    ]
    assert "6 of 9 runs finished: 20 iterations of 2 images" in text
    assert f"- GN3 seed 2: failed: ValueError: it does not divide ({comparison.runs[-1].path('output.txt')})" in text
    assert (tmp_path / "out" / "channels_per_group.png").exists()
    row = read_rows(tmp_path / "out" / "results.json", ComparisonRow)[1]
    assert row.channels_per_group == [[4, 4], [32, 3]]  # 4 layers 64 -> 32 with 8 groups, 3 layers 32 -> 32 with 1
    assert row.curves == {"0": [[20, 41]], "1": [[20, 42]], "2": [[20, 43]]}
    assert (row.norm, row.metric, row.values, row.difference) == ("PGN", "AP", [41, 42, 43], 1)
    assert row.machine == comparison.machine()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(row.commit.removesuffix("-dirty")) if head else row.commit == "unknown"


@pytest.mark.slow
@pytest.mark.parametrize("test", ["('quick_val',)", "()"])
def test_results_of_another_machine_go_on_with_more_seeds_and_norms(test, job, tmp_path, small):
    """The result is AP, or the loss if DATASETS.TEST is empty."""
    given = ["SOLVER.MAX_ITER", "20", "DATASETS.TEST", test]
    kept, folder = tmp_path / "kept.json", tmp_path / "out"
    first = small(["GN"], [0, 1], given)
    list(train_all(Local(first)))
    write_report(first)
    rows = [replace(row, machine="a; b", commit="c") for row in read_rows(folder / "results.json", ComparisonRow)]
    write_rows(kept, rows)
    shutil.rmtree(folder)

    more = small(["GN", "PGN"], [0, 1, 2], given)
    restore_runs(more, str(kept))
    ended = [str(run) for run in train_all(Local(more))]
    assert ended == ["PGN seed 0", "PGN seed 1", "GN seed 2", "PGN seed 2"]
    assert "6 of 6 runs finished" in write_report(more)
    gn, pgn = read_rows(folder / "results.json", ComparisonRow)
    assert (gn.seeds, gn.values[:2]) == ([0, 1, 2], rows[0].values) and len(pgn.values) == 3
    assert {seed: gn.curves[seed] for seed in "01"} == rows[0].curves
    assert set(gn.machine.split("; ")) == {"a", "b", more.machine()} and "c" in gn.commit.split("; ")
    assert gn.recipe == first.recipe()


def test_results_of_another_comparison_are_not_taken(tmp_path, small):
    kept = tmp_path / "kept.json"
    (row,) = summarize({"GN": {0: {"AP": 40.0}}}, {})
    mine = small(["GN"], [0])
    for recipe in (small(overrides=["SOLVER.MAX_ITER", "30"]).recipe(), small(num_gpus=2).recipe(), ""):
        write_rows(kept, [replace(row, recipe=mine.recipe()), replace(row, recipe=recipe)])
        with pytest.raises(InputError, match="--finished: .*kept.json holds results of another comparison"):
            restore_runs(mine, str(kept))
    assert mine.state(mine.runs[0]).status == "not finished"
    assert small(["PGN"], [5], recompute_norms=True).recipe() == mine.recipe()


def test_a_metric_that_could_not_be_computed_stays_unknown(tmp_path, small):
    """A metric that Detectron2 could not compute is None in the file and in the restored run."""
    kept, comparison = tmp_path / "kept.json", small(["GN"], [3])
    rows = summarize({"GN": {3: {"AP": 1.0, "AP50": None}}}, {})
    write_rows(kept, [replace(row, recipe=comparison.recipe(), machine="a") for row in rows])
    restore_runs(comparison, str(kept))
    assert comparison.state(comparison.runs[0]).status == "finished"
    assert run_results(comparison.runs[0], 20, ["a"]).values == {"AP": 1.0, "AP50": None}


@pytest.mark.slow
def test_the_paper_stands_beside_its_own_training_only(tmp_path):
    def of(name, norm, overrides=()):
        comparison = Comparison(f"configs/{name}.yaml", [norm], [0], str(tmp_path), overrides=overrides)
        return paper_values(comparison.norm_cfg(norm))

    assert of("pfpn_gn", "GN") == {"PQ": 41.750, "PQ_th": 49.357, "PQ_st": 30.268}
    assert of("pfpn_gn", "PGN", ["SOLVER.REFERENCE_WORLD_SIZE", "8", "DATALOADER.NUM_WORKERS", "1"])["PQ"] == 42.147
    assert of("faster_rcnn_pgn_ws", "GN1") == {"AP": 40.4, "AP50": 60.9, "AP75": 44.3}
    assert of("pfpn_gn", "GN16") == of("quick/pfpn_gn", "GN") == {}
    assert of("faster_rcnn_gn_ws", "GN", ["SOLVER.MAX_ITER", "1000"]) == {}


def test_curves_are_averaged_over_stretches_that_all_seeds_have(monkeypatch):
    """There are 100 stretches of four iterations, and the short run has the last two of them."""
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path, dpi: figures.append(figure))
    long = [(iteration, 2.0 * iteration) for iteration in range(400)]
    short = [(iteration, 1.0) for iteration in range(392, 400)]
    report.plot_curves({"PQ": {"GN": {0: long, 1: short}}}, "curves.png")
    iterations, mean = figures[0].axes[0].lines[0].get_data()
    np.testing.assert_allclose(iterations, [393.5, 397.5])
    np.testing.assert_allclose(mean, [(787 + 1) / 2, (795 + 1) / 2])


def test_the_last_values_of_a_run(tmp_path):
    run = Run("GN", 0, str(tmp_path))
    losses = [{"iteration": i, "total_loss": float(i)} for i in (19, 39, 59, 79, 94, 99)]
    evaluations = [{"iteration": 59, "bbox/AP": 1.0}, {"iteration": 100, "bbox/AP": 2.0, "bbox/AP50": float("nan")}]

    def write(records):
        (tmp_path / "metrics.json").write_text("".join(json.dumps(record) + "\n" for record in records))

    write([*losses[:2], {**losses[2], **evaluations[0]}, *losses[3:], evaluations[1]])
    values, curves = run_results(run, 99, ["a"])
    assert values == {"AP": 2.0, "AP50": None} and curves["AP"] == [(59, 1.0), (99, 2.0)]
    write([*losses, {"iteration": 99, "bbox/AP": 1.5}, evaluations[1]])  # ended after an evaluation, before run.json
    assert run_results(run, 99, ["a"]).curves["AP"] == [(99, 2.0)]
    write(losses)
    assert run_results(run, 99, ["a"]).values == {"total_loss": 96.5}  # of iterations 94 and 99


FOUND = {"bbox": {"AP": 1.0}, "segm": {"AP": 2.0, "AP50": 3.0}, "keypoints": {"AP": 4.0}, "sem_seg": {"IoU": 5.0}}


@pytest.mark.parametrize(
    "results, values",
    [
        (FOUND, {"AP": 1, "mask AP": 2, "mask AP50": 3, "keypoint AP": 4, "IoU": 5}),
        ({"box_proposals": {"AR@1000": 6.0}}, {"AR@1000": 6}),
        ({"a": {"bbox": {"AP": 1.0}}, "b": FOUND}, {"a AP": 1, "b AP": 1, "b mask AP": 2, "b mask AP50": 3}),
        ({"my_task": {"score": 1.0}}, {"total_loss": 7}),
    ],
)
def test_each_metric_of_each_test_set_is_read_and_restored(results, values, small, tmp_path):
    """``results`` is what Detectron2's DefaultTrainer.test returns: of a single test set without its name."""
    sets = [name for name in results if name in ("a", "b")] or ["a"]
    comparison = small(["GN"], [0], ["SOLVER.MAX_ITER", "5", "DATASETS.TEST", str(tuple(sets))])
    run = comparison.runs[0]
    Path(run.folder).mkdir(parents=True)
    records = [{"iteration": 4, "total_loss": 7.0}, {"iteration": 5, **flatten_results_dict(results)}]
    Path(run.path("metrics.json")).write_text("".join(json.dumps(record) + "\n" for record in records))
    found = run_results(run, 5, sets)
    assert values.items() <= found.values.items() and ("total_loss" in found.values) == ("total_loss" in values)
    run.record(RunState("finished"))
    assert ("none of the metrics that are known" in write_report(comparison)) == ("total_loss" in values)
    kept = Path(comparison.output, "results.json").rename(tmp_path / "kept.json")
    shutil.rmtree(comparison.output)
    restore_runs(comparison, str(kept))
    assert run_results(run, 5, sets).values == found.values and comparison.state(run).status == "finished"


def test_a_seed_that_detects_nothing_is_said(line_of):
    rows = summarize({"GN": {s: {"AP": 40.0} for s in range(3)}, "PGN": {0: {"AP": None}, 1: {"AP": 41.0}}}, {})
    text = report.table(rows)
    assert line_of(text, "PGN  ") == ["PGN", "2", "-"] and line_of(text, "PGN - GN") == ["PGN - GN", "2", "-"]
    assert "or the models of some seeds detect nothing" in text
    assert "single seed" not in text and "interval" not in text


def test_the_report_says_what_all_runs_had(tmp_path, shapes):
    def written(*norms, keys=None, **options):
        config, output = "configs/quick/faster_rcnn_gn_ws.yaml", str(tmp_path / "out")
        Path(output).mkdir(exist_ok=True)
        comparison = Comparison(config, norms, [0], output, keys, ["MODEL.FPN.NORM", "GN"], **options)
        return write_report(comparison)

    keys = ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM"]
    text = written("GN", "BN", "PGN", keys=keys, fuse_norms=True, calibrate_norms=64)
    assert (
        "each norm as MODEL.RESNETS.NORM, MODEL.FPN.NORM, +WS added in MODEL.RESNETS.NORM, but BN without it." in text
    )
    assert "Options: --fuse-norms --calibrate-norms 64 --num-gpus 1 --num-machines 1 MODEL.FPN.NORM GN." in text
    text = written("GN", "", keys=keys[:1])
    assert "each norm as MODEL.RESNETS.NORM, +WS added in MODEL.RESNETS.NORM, but no norm without it." in text
    assert "each norm as MODEL.FPN.NORM." in written("GN", keys=keys[1:])
