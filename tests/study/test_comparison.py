"""Comparisons of norms: which runs, that all else is equal, killed and failing runs, and what the report says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultTrainer, default_setup

from gng_d2.config import load_config
from gng_d2.engine import Trainer
from gng_d2.errors import InputError
from gng_d2.files import read_rows
from study import comparison as compare
from study import plots
from study import report as summary
from study.comparison import Comparison, default_norm_keys, time_iteration, train_all
from study.report import paper_values, summarize, write_report

CONFIG = "configs/quick/pfpn_gn.yaml"
KEYS = ["MODEL.SEM_SEG_HEAD.NORM"]
TINY = [
    "MODEL.FPN.OUT_CHANNELS",
    "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "32",
    "SOLVER.IMS_PER_BATCH",
    "2",
    "SOLVER.BASE_LR",
    "0.002",
    "SOLVER.MAX_ITER",
    "5",
    "SOLVER.CHECKPOINT_PERIOD",
    "2",
]


# which runs


@pytest.mark.parametrize(
    "name, keys",
    [
        ("pfpn_gn", {"SEM_SEG_HEAD"}),
        ("faster_rcnn_pgn_ws", {"RESNETS", "FPN", "ROI_BOX_HEAD"}),
        ("quick/pfpn_pgn", {"RESNETS", "FPN", "SEM_SEG_HEAD"}),
        ("quick/faster_rcnn_gn1_ws", {"RESNETS", "FPN", "ROI_BOX_HEAD"}),
    ],
)
def test_the_norms_of_the_model_that_are_gn_or_ours_are_varied(name, keys):
    """Not FrozenBN, and not SEM_SEG_HEAD.NORM, GN by default, where there is no such head."""
    assert set(default_norm_keys(load_config(f"configs/{name}.yaml"))) == {f"MODEL.{key}.NORM" for key in keys}


def test_a_norm_keeps_weight_standardization(tmp_path):
    comparison = Comparison("configs/quick/faster_rcnn_gn_ws.yaml", ["GN", "GN1", "PGN+WS"], [0], str(tmp_path))
    for norm, expected in (("GN", "GN+WS"), ("GN1", "GN1+WS"), ("PGN+WS", "PGN+WS")):
        model = comparison.norm_cfg(norm).MODEL
        assert {model.RESNETS.NORM, model.FPN.NORM, model.ROI_BOX_HEAD.NORM} == {expected}
        assert model.SEM_SEG_HEAD.NORM == "GN"


def test_a_seed_has_the_same_weights_and_images_under_every_norm(shapes, tmp_path):
    def start(norm, seed):
        comparison = Comparison(CONFIG, [norm], [seed], str(tmp_path), overrides=TINY)
        cfg = load_config(CONFIG, comparison.run_overrides(comparison.runs[0]))
        default_setup(cfg, SimpleNamespace())
        trainer = Trainer(cfg)
        batches = [next(trainer._trainer._data_loader_iter) for _ in range(3)]
        return trainer.model.state_dict(), [sample["image"] for batch in batches for sample in batch]

    weights, images = start("GN", 3)
    for norm in ("GN1", "PGN"):
        others, other_images = start(norm, 3)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        assert all(torch.equal(a, b) for a, b in zip(images, other_images, strict=True))
    others, other_images = start("GN", 4)
    name = "sem_seg_head.p2.0.weight"
    assert not torch.equal(weights[name], others[name])
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(images, other_images))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"norms": ["GN", "GN"]}, "--norms: GN GN has one twice"),
        ({"seeds": [0, -1]}, "--seeds: -1 is no seed"),
        ({"keys": ["MODEL.FPN"]}, "--norm-keys: MODEL.FPN is no NORM key"),
        ({"num_machines": 2}, "give --dist-url"),
        (
            {"keys": None, "overrides": [f"MODEL.{k}.NORM BN" for k in ("FPN", "RESNETS", "SEM_SEG_HEAD")]},
            "no norm that is GN",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    given = {"config_file": CONFIG, "norms": ["GN"], "seeds": [0], "output": str(tmp_path), "keys": KEYS, **arguments}
    given["overrides"] = " ".join(given.get("overrides", [])).split()
    with pytest.raises(InputError, match=message):
        Comparison(**given)


# running them: a job that does what its norm says, in no time

JOB = """
import json, os, signal, sys
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder, seed, norm = given["OUTPUT_DIR"], int(given["SEED"]), given["MODEL.SEM_SEG_HEAD.NORM"]
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, "arguments"), "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if norm == "GN3":
    print("Traceback (most recent call last):\\n  File ...\\nValueError: it does not divide\\nDetails: none")
    sys.exit(1)
if norm == "GN5":
    os.kill(os.getpid(), signal.SIGKILL)
iterations = int(given["SOLVER.MAX_ITER"])
with open(os.path.join(folder, "metrics.json"), "a") as file:
    for record in (
        {"iteration": iterations - 1, "total_loss": 1.0 + seed, "time": 0.25},
        {"iteration": iterations, "bbox/AP": {"GN": 40.0, "PGN": 41.0}[norm] + seed, "bbox/APl": float("nan")},
    ):
        file.write(json.dumps(record) + "\\n")
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    monkeypatch.setattr(compare, "TRAIN_NET", str(script))


def small(tmp_path, norms=("GN", "PGN"), seeds=(0, 1), overrides=("SOLVER.MAX_ITER", "20"), **launch):
    return Comparison(CONFIG, norms, seeds, str(tmp_path / "out"), KEYS, overrides, **launch)


def run(comparison):
    return [(str(run), run.state()["status"]) for run in train_all(comparison)]


def calls(comparison):
    return [len(Path(run.path("arguments")).read_text().splitlines()) for run in comparison.runs]


def test_what_finished_is_not_run_again_and_what_failed_is(job, tmp_path):
    comparison = small(tmp_path, ["GN", "GN3", "GN5", "PGN"], [0])
    for _ in range(2):
        assert run(comparison) == [
            ("GN seed 0", "finished"),
            ("GN3 seed 0", "failed"),
            ("GN5 seed 0", "failed"),
            ("PGN seed 0", "finished"),
        ]
    assert calls(comparison) == [1, 2, 2, 1]
    reasons = [run.state()["reason"] for run in comparison.runs]
    assert reasons == [None, "ValueError: it does not divide", "killed by SIGKILL (out of memory?)", None]


def test_runs_are_jobs_of_the_given_size_that_differ_in_norm_and_seed(job, tmp_path):
    comparison = small(tmp_path, num_gpus=2, num_machines=2, machine_rank=1, dist_url="tcp://first:1")
    list(train_all(comparison))
    for run in comparison.runs:
        assert Path(run.path("arguments")).read_text().split() == [
            *("--resume", "--config-file", CONFIG, "--num-gpus", "2", "--num-machines", "2", "--machine-rank", "1"),
            *("--dist-url", "tcp://first:1", "SOLVER.MAX_ITER", "20", KEYS[0], run.norm, "SEED", str(run.seed)),
            *("OUTPUT_DIR", run.folder),
        ]
    assert comparison.runs[0].state()["status"] == "not finished"  # the first machine writes what is shared


def test_a_run_that_another_process_has_is_left_alone(job, tmp_path):
    comparison = small(tmp_path)
    os.makedirs(comparison.runs[1].folder)
    with compare._lock(comparison.runs[1].path("lock.0")):
        assert [status for _, status in run(comparison)] == ["finished", "not finished", "finished", "finished"]
    assert [status for _, status in run(comparison)] == ["finished"] * 4


def test_an_interrupted_comparison_leaves_no_process(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with open(tmp_path / "output", "wb+") as output:
        with pytest.raises(KeyboardInterrupt):
            compare._call([sys.executable, "-c", "import time; time.sleep(600)"], output, interrupt)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not any(b"time.sleep(600)" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def test_another_comparison_in_the_folder_is_refused(tmp_path):
    small(tmp_path).claim_output()
    small(tmp_path, ["PGN", "GN1"], [5]).claim_output()  # more runs of the same
    for other, difference in (
        (small(tmp_path, overrides=["SOLVER.MAX_ITER", "30"]), "SOLVER.MAX_ITER: 20 there, 30 here"),
        (small(tmp_path, num_gpus=2), "processes: 1 there, 2 here"),
        (
            Comparison(CONFIG, ["GN"], [0], str(tmp_path / "out"), ["MODEL.FPN.NORM"], ["SOLVER.MAX_ITER", "20"]),
            "MODEL.FPN.NORM: GN there, <norm> here",
        ),
    ):
        with pytest.raises(InputError, match=difference):
            other.claim_output()


def test_the_schedule_is_scaled_to_the_processes(tmp_path):
    overrides = ["SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.MAX_ITER", "100", "SOLVER.IMS_PER_BATCH", "16"]
    assert small(tmp_path, overrides=overrides).cfg.SOLVER.MAX_ITER == 800
    assert small(tmp_path, overrides=overrides, num_gpus=4).cfg.SOLVER.MAX_ITER == 200


@pytest.mark.parametrize("processes", [1, 2])
def test_a_plan_times_few_iterations_of_a_scaled_schedule_too(processes, job, tmp_path, monkeypatch):
    commands, call = [], compare._call
    monkeypatch.setattr(compare, "_call", lambda command, *rest: commands.append(command) or call(command, *rest))
    overrides = ["SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.MAX_ITER", "9000"]
    comparison = small(tmp_path, overrides=overrides, num_gpus=processes)
    assert time_iteration(comparison, "PGN") == 0.25
    cfg = load_config(CONFIG, commands[0][commands[0].index(overrides[0]) :])
    assert 20 < DefaultTrainer.auto_scale_workers(cfg, processes).SOLVER.MAX_ITER < 30
    with pytest.raises(InputError, match="GN3: ValueError: it does not divide"):
        time_iteration(comparison, "GN3")


# a real one, killed

KILL = """
import os, runpy, signal, sys, time
sys.path.insert(0, "tools")
import study.comparison
from gng_d2.engine import Trainer
sys.argv[0] = "compare.py"
if len(sys.argv) > 1 and sys.argv[1] == "--resume":  # the job
    step = Trainer.run_step
    def run_step(self):
        step(self)
        if self.iter == 3:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(5)
            open(os.path.join(self.cfg.OUTPUT_DIR, "survived"), "w").close()
    Trainer.run_step = run_step
    runpy.run_path("tools/train_net.py", run_name="__main__")
else:
    study.comparison.TRAIN_NET = __file__
    runpy.run_path("tools/compare.py", run_name="__main__")
"""


def test_killed_and_started_again_it_ends_with_the_same_table(shapes, tmp_path, monkeypatch):
    """With a run that cannot work: 64 channels in 3 groups."""

    def tool(script):
        given = ["--config-file", CONFIG, "--norms", "PGN", "GN3", "--seeds", "0", "--output", str(cut), *TINY]
        return subprocess.run([sys.executable, "-W", "ignore", script, *given], capture_output=True, text=True)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killer, whole, cut = tmp_path / "killer.py", tmp_path / "whole", tmp_path / "cut"
    killer.write_text(KILL)
    assert tool(str(killer)).returncode == -9
    assert (cut / "PGN" / "seed_0" / "last_checkpoint").read_text() == "model_0000001.pth"
    done = tool("tools/compare.py")
    assert not (cut / "PGN" / "seed_0" / "survived").exists()
    assert "Starting training from iteration 2" in (cut / "PGN" / "seed_0" / "log.txt").read_text()
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: 1 of 2 runs failed")
    assert "- GN3 seed 0: failed: GN3 cannot follow Conv2d(3, 64)" in done.stdout

    uninterrupted = Comparison(CONFIG, ["PGN", "GN3"], [0], str(whole), overrides=TINY)
    list(train_all(uninterrupted))
    write_report(uninterrupted)
    expected, rows = ([{**row, "machine": ""} for row in read_rows(f / "results.json")] for f in (whole, cut))
    assert rows == expected
    assert [row["metric"] for row in rows] == 2 * ["PQ", "PQ_th", "PQ_st", "SQ", "RQ", "AP", "AP50", "AP75", "mIoU"]
    assert [row["seeds"] for row in rows] == [[0]] * 9 + [[]] * 9


def test_two_processes_train_a_run(shapes, tmp_path, monkeypatch):
    """gloo, where there is no GPU."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    comparison = Comparison(CONFIG, ["PGN"], [0], str(tmp_path), overrides=[*TINY, "DATASETS.TEST", "()"], num_gpus=2)
    (run,) = train_all(comparison)
    assert run.state()["status"] == "finished" and run.state()["machine"].startswith("2 x ")
    assert "World size: 2" in open(run.path("log.txt")).read()
    write_report(comparison)
    (row,) = read_rows(tmp_path / "results.json")
    assert row["metric"] == "total_loss" and len(row["values"]) == 1 and row["mean"] > 0


# what the report says


def test_statistics_are_those_by_hand():
    values = {
        "GN": {0: {"PQ": 40.0}, 1: {"PQ": 42.0}, 2: {"PQ": 44.0}},
        "PGN": {0: {"PQ": 41.0}, 1: {"PQ": 42.0}, 2: {"PQ": 47.0}, 3: {"PQ": 50.0}},
        "GN1": {2: {"PQ": 40.0}},
        "GN2": {0: {"PQ": None}, 1: {"PQ": 1.0}},
        "GN4": {},
    }
    gn, pgn, gn1, gn2, gn4 = summarize(values, {"GN": {"PQ": 41.75}})
    assert (gn["mean"], gn["std"], gn["seeds"], gn["difference"], gn["paper"]) == (42, 2, [0, 1, 2], None, 41.75)
    assert (pgn["mean"], pgn["values"]) == (45, [41, 42, 47, 50])
    assert pgn["std"] == pytest.approx((54 / 3) ** 0.5)  # 16 + 9 + 4 + 25
    # 1, 0 and 3 for the common seeds: mean 4/3, variance (1/9 + 16/9 + 25/9) / 2 = 7/3, over three
    assert (pgn["difference"], pgn["difference_seeds"]) == (pytest.approx(4 / 3), 3)
    assert pgn["difference_error"] == pytest.approx((7 / 9) ** 0.5)
    assert (gn1["mean"], gn1["std"], gn1["difference"], gn1["difference_error"]) == (40, None, -4, None)
    assert (gn2["mean"], gn2["difference"], gn4["mean"], gn4["difference"]) == (None, None, None, None)


@pytest.mark.parametrize("pairs, marked", [((1.0, 1.1, 1.2), True), ((0.2, 1.1, 2.0), False), ((1.0, 2.0), False)])
def test_a_difference_is_marked_where_the_seeds_do_not_explain_it(pairs, marked):
    """Standard errors of 0.06 and 0.52 with 2 degrees of freedom (t 4.303), of 0.5 with 1 (t 12.706)."""
    values = {"GN": {s: {"AP": 0.0} for s in range(len(pairs))}, "PGN": {s: {"AP": d} for s, d in enumerate(pairs)}}
    rows = summarize(values, {})
    (line,) = summary.differences_table(rows)
    assert line["AP"].endswith("*") == marked
    low, high = summary.difference_interval(rows[1])
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
    assert "4 comparisons were made here" in summary.intervals_note(rows)
    assert "no interval" in summary.intervals_note([row for row in rows if row["norm"] in ("GN", "GN2")])


def test_the_report_of_finished_runs(job, tmp_path):
    comparison = small(tmp_path, ["GN", "PGN", "GN3"], [0, 1, 2])
    list(train_all(comparison))
    text = write_report(comparison)
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        *(["norm", "seeds", "AP"], ["GN", "3", "41.00 ± 1.00"], ["PGN", "3", "42.00 ± 1.00"], ["GN3", "0", "-"]),
        *(["difference", "seeds", "AP"], ["PGN - GN", "3", "+1.00 (+1.00 to +1.00) *"], ["GN3 - GN", "0", "-"]),
    ]
    assert "6 of 9 runs finished: 20 iterations of 2 images" in text
    assert f"- GN3 seed 2: failed: ValueError: it does not divide ({comparison.runs[-1].path('output.txt')})" in text
    assert (tmp_path / "out" / "channels_per_group.png").exists()
    row = read_rows(tmp_path / "out" / "results.json")[1]
    assert row["channels_per_group"] == [[4, 4], [32, 3]]  # 4 layers 64 -> 32 with 8 groups, 3 layers 32 -> 32 with 1
    assert row["curves"] == {"0": [[20, 41]], "1": [[20, 42]], "2": [[20, 43]]}
    assert (row["norm"], row["metric"], row["values"], row["difference"]) == ("PGN", "AP", [41, 42, 43], 1)
    assert row["machine"] == comparison.machine()


def test_the_paper_stands_beside_its_own_training_only(tmp_path):
    def of(name, norm, overrides=()):
        comparison = Comparison(f"configs/{name}.yaml", [norm], [0], str(tmp_path), overrides=overrides)
        return paper_values(comparison.norm_cfg(norm))

    assert of("pfpn_gn", "GN") == {"PQ": 41.750, "PQ_th": 49.357, "PQ_st": 30.268}
    assert of("pfpn_gn", "PGN", ["SOLVER.REFERENCE_WORLD_SIZE", "8", "DATALOADER.NUM_WORKERS", "1"])["PQ"] == 42.147
    assert of("faster_rcnn_pgn_ws", "GN1") == {"AP": 40.4, "AP50": 60.9, "AP75": 44.3}
    assert of("pfpn_gn", "GN16") == of("quick/pfpn_gn", "GN") == {}
    assert of("faster_rcnn_gn_ws", "GN", ["SOLVER.MAX_ITER", "1000"]) == {}


def test_curves_are_averaged_over_stretches_that_all_seeds_have():
    long = [(iteration, 2.0 * iteration) for iteration in range(100)]
    short = [(iteration, 1.0) for iteration in range(50, 100)]
    iterations, values = plots._binned([long, short], bins=4)
    np.testing.assert_allclose(iterations, [62, 87])
    np.testing.assert_allclose(values, [[124, 174], [1, 1]])


def test_the_last_values_of_a_run(tmp_path):
    run = compare.Run("GN", 0, str(tmp_path))
    losses = [{"iteration": i, "total_loss": float(i)} for i in (19, 39, 59, 79, 94, 99)]
    evaluations = [{"iteration": 59, "bbox/AP": 1.0}, {"iteration": 100, "bbox/AP": 2.0, "bbox/AP50": float("nan")}]

    def write(records):
        (tmp_path / "metrics.json").write_text("".join(json.dumps(record) + "\n" for record in records))

    write([*losses[:2], {**losses[2], **evaluations[0]}, *losses[3:], evaluations[1]])
    assert summary.final_values(run) == {"AP": 2.0, "AP50": None}
    assert summary.curves_of(run, 99)["AP"] == [(59, 1.0), (99, 2.0)]
    assert run.iterations_done(200) == 101
    write(losses)
    assert summary.final_values(run) == {"total_loss": 96.5}  # of iterations 94 and 99
