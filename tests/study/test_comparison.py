"""Comparisons of norms: their runs, that all else is equal, and runs that are killed, fail or are damaged."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick_models
import ready_process
import torch
import yaml
from detectron2.engine import default_setup

from gng_d2.errors import InputError
from gng_d2.job.config import load_config
from gng_d2.job.engine import Trainer
from study.comparison import Comparison, default_norm_keys
from study.local import Local
from study.report import ComparisonRow, write_report
from study.rows import read_rows
from study.watch import train_all

CONFIG = "configs/quick/pfpn_gn.yaml"
KEYS = ["MODEL.SEM_SEG_HEAD.NORM"]
TINY = [
    *quick_models.TRAINING,
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
    """FrozenBN is not varied, nor is SEM_SEG_HEAD.NORM, which is GN by default, if there is no such head."""
    assert set(default_norm_keys(load_config(f"configs/{name}.yaml"))) == {f"MODEL.{key}.NORM" for key in keys}


def test_a_norm_keeps_weight_standardization(tmp_path):
    comparison = Comparison("configs/quick/faster_rcnn_gn_ws.yaml", ["GN", "GN1", "PGN+WS"], [0], str(tmp_path))
    for norm, expected in (("GN", "GN+WS"), ("GN1", "GN1+WS"), ("PGN+WS", "PGN+WS")):
        model = comparison.norm_cfg(norm).MODEL
        assert {model.RESNETS.NORM, model.FPN.NORM, model.ROI_BOX_HEAD.NORM} == {expected}
        assert model.SEM_SEG_HEAD.NORM == "GN"


def test_a_norm_that_is_null_is_none_to_vary_until_it_is_named(tmp_path):
    config = tmp_path / "null.yaml"
    config.write_text(f"_BASE_: {Path(CONFIG).resolve()}\nMODEL: {{FPN: {{NORM: null}}}}\n")
    assert "MODEL.FPN.NORM" not in Comparison(str(config), ["GN"], [0], "out").keys
    assert Comparison(str(config), ["PGN"], [0], "out", ["MODEL.FPN.NORM"]).norm_cfg("PGN").MODEL.FPN.NORM == "PGN"


def test_norms_of_detectron2_have_no_weight_standardization(tmp_path):
    keys = ["MODEL.RESNETS.NORM"]
    config = "configs/quick/faster_rcnn_gn_ws.yaml"
    comparison = Comparison(config, ["FrozenBN", "", "nnSyncBN", "PGN"], [0], str(tmp_path), keys)
    assert [comparison.norm_cfg(norm).MODEL.RESNETS.NORM for norm in comparison.norms] == [
        "FrozenBN",
        "",
        "nnSyncBN",
        "PGN+WS",
    ]
    for norms in (["PGN", "GN", "PGN+WS"], ["PGN+WS", "PGN"]):
        with pytest.raises(InputError, match=r"^--norms PGN\S* PGN\S*: both are PGN\+WS here.*MODEL.RESNETS.NORM GN$"):
            Comparison(config, norms, [0], str(tmp_path), keys)
    Comparison(config, ["PGN", "PGN+WS"], [0], str(tmp_path), keys, ["MODEL.RESNETS.NORM", "GN"])


@pytest.mark.slow
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
        ({"norms": ["GN", "GN"]}, "--norms GN GN: one of them stands there twice"),
        ({"seeds": [0, -1]}, "--seeds -1: a seed is 0 or more"),
        ({"keys": ["MODEL.FPN"]}, "--norm-keys: the config has no NORM key MODEL.FPN. It has"),
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


def test_another_comparison_in_the_folder_is_refused(tmp_path, small):
    small().claim_output()
    small(["PGN", "GN1"], [5], recompute_norms=True).claim_output()  # more runs of the same
    for other, difference in (
        (small(overrides=["SOLVER.MAX_ITER", "30"]), "SOLVER.MAX_ITER: 20 there, 30 here"),
        (small(num_gpus=2), "processes: 1 there, 2 here"),
        (small(fuse_norms=True), "fuse_norms: None there, True here"),
        (
            Comparison(CONFIG, ["GN"], [0], str(tmp_path / "out"), ["MODEL.FPN.NORM"], ["SOLVER.MAX_ITER", "20"]),
            "MODEL.FPN.NORM: GN there, <norm> here",
        ),
    ):
        with pytest.raises(InputError, match=difference):
            other.claim_output()


NEUTRAL = "SOLVER.CHECKPOINT_PERIOD 50 DATALOADER.NUM_WORKERS 1 TEST.EVAL_PERIOD 7 MODEL.DEVICE cuda".split()


def test_keys_that_change_no_training_may_change_in_a_folder(small):
    """Also in a folder of an older version, whose comparison.yaml has them."""
    first, again = small(), small(overrides=["SOLVER.MAX_ITER", "20", *NEUTRAL])
    assert first.recipe() == again.recipe()
    first.claim_output()
    again.claim_output()
    cfg = first.cfg.clone()
    cfg.merge_from_list(first.norm_overrides("<norm>"))
    settings = {"processes": 1, "config": yaml.safe_load(cfg.dump())}
    Path(first.output, "comparison.yaml").write_text(yaml.safe_dump(settings))
    again.claim_output()
    with pytest.raises(InputError, match="SOLVER.MAX_ITER: 20 there, 30 here"):
        small(overrides=["SOLVER.MAX_ITER", "30", *NEUTRAL]).check_output()


def test_a_key_that_makes_no_norm_is_refused(tmp_path, shapes):
    """Each run would train the same model."""
    config = "configs/quick/faster_rcnn_gn_ws.yaml"
    for key in ("MODEL.SEM_SEG_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM"):
        comparison = Comparison(config, ["GN", "PGN"], [0], str(tmp_path), ["MODEL.FPN.NORM", key])
        with pytest.raises(InputError, match=f"^--norm-keys {key}: this model has no norm that is made by that key"):
            comparison.check()
    Comparison(config, ["GN", ""], [0], str(tmp_path), ["MODEL.FPN.NORM"], ["MODEL.FPN.NORM", ""]).check()


def test_fused_norms_are_asked_of_each_run(small, shapes, monkeypatch):
    comparison = small(fuse_norms=True)
    assert all("--fuse-norms" in comparison.command(run) for run in comparison.runs)
    assert "--fuse-norms" not in small().command(comparison.runs[0])
    checked = []
    monkeypatch.setattr("study.comparison.fuse_norms", checked.append)
    comparison.check()
    assert len(checked) == 2


def test_the_schedule_is_scaled_to_the_processes(small):
    overrides = ["SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.MAX_ITER", "100", "SOLVER.IMS_PER_BATCH", "16"]
    assert small(overrides=overrides).cfg.SOLVER.MAX_ITER == 800
    assert small(overrides=overrides, num_gpus=4).cfg.SOLVER.MAX_ITER == 200


# a real one, killed

KILL = """
import os, runpy, signal, sys, time
sys.path.insert(0, "tools")
import study.comparison
from gng_d2.job.engine import Trainer
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


@pytest.mark.slow
def test_killed_and_started_again_it_ends_as_one_that_was_not(shapes, tmp_path, monkeypatch):
    def tool(script):
        given = ["--config-file", CONFIG, "--norms", "PGN", "GN1", "--seeds", "0", "--output", str(cut), *TINY]
        return ready_process.run(script, given)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killer, whole, cut = tmp_path / "killer.py", tmp_path / "whole", tmp_path / "cut"
    killer.write_text(KILL)
    assert tool(killer).returncode == -9
    assert (cut / "PGN" / "seed_0" / "last_checkpoint").read_text() == "model_0000001.pth"
    done = tool("tools/compare.py")
    assert not (cut / "PGN" / "seed_0" / "survived").exists()
    assert "Starting training from iteration 2" in (cut / "PGN" / "seed_0" / "log.txt").read_text()
    assert done.returncode == 0, done.stderr

    uninterrupted = Comparison(CONFIG, ["PGN"], [0], str(whole), overrides=TINY)
    list(train_all(Local(uninterrupted)))
    write_report(uninterrupted)
    expected, rows = (
        [replace(row, machine="", commit="") for row in read_rows(folder / "results.json", ComparisonRow)]
        for folder in (whole, cut)
    )
    assert rows[:12] == expected  # the run that was killed
    assert {row.norm for row in rows[12:]} == {"GN1"} and all(row.difference_seeds == 1 for row in rows[12:])
    boxes = ["AP", "AP50", "AP75"]
    metrics = ["PQ", "PQ_th", "PQ_st", "SQ", "RQ", *boxes, *(f"mask {name}" for name in boxes), "mIoU"]
    assert [row.metric for row in rows] == 2 * metrics and all(row.seeds == [0] for row in rows)


def test_a_norm_with_which_no_run_could_start_is_refused_before_the_first(shapes, tmp_path):
    """3 groups do not divide 64 channels."""
    comparison = Comparison(CONFIG, ["PGN", "GN3"], [0], str(tmp_path), overrides=TINY)
    with pytest.raises(InputError, match=r"backbone.fpn_lateral2.norm and 34 more: GN3 cannot follow Conv2d\(64, 32\)"):
        comparison.check()


# one damaged folder


def run(comparison):
    list(train_all(Local(comparison)))
    return [comparison.state(run).status for run in comparison.runs]


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_text("")


def garbage(path):
    path.write_bytes(b"\x00\xff{[" * 50)


def other_json(path):
    path.write_text("[1]\n")


def no_status(path):
    path.write_text('{"status": 5, "reason": [2]}')


def too_deep(path):
    path.write_text("[" * 10**5)


def of_texts(path):
    path.write_text('{"iteration": 20, "total_loss": "1"}')


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = [
    *(("run.json", damage) for damage in (truncate, empty, garbage, other_json, no_status, too_deep, folder)),
    *(
        ("metrics.json", damage)
        for damage in (remove, truncate, empty, garbage, other_json, of_texts, too_deep, folder)
    ),
]


@pytest.mark.slow
def test_a_damaged_run_has_failed_and_takes_no_other_down(job, small, monkeypatch):
    monkeypatch.setattr("study.report.save_figure", lambda figure, path, dpi: None)
    comparison = small()
    list(train_all(Local(comparison)))
    damaged = comparison.runs[3]
    for name, damage in DAMAGE:
        path = Path(damaged.path(name))
        whole = path.read_bytes()
        damage(path)
        text = write_report(comparison)
        assert "3 of 4 runs finished" in text and "| 40.50 ± 0.71 |" in text, (name, damage)
        (line,) = [line for line in text.splitlines() if line.startswith("- ")]
        assert line.startswith("- PGN seed 1: failed: ") and damaged.folder in line, (name, damage)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)
    assert "4 of 4 runs finished" in write_report(comparison)


@pytest.mark.parametrize("name, damage, ends", [("run.json", empty, "finished"), ("metrics.json", folder, "failed")])
def test_a_damaged_run_is_tried_once_more(name, damage, ends, job, small):
    comparison = small(["GN", "PGN"], [0])
    list(train_all(Local(comparison)))
    damage(Path(comparison.runs[1].path(name)))
    assert run(comparison) == ["finished", ends]


def test_a_file_in_place_of_a_folder_is_one_failed_run(job, small):
    comparison = small()
    Path(comparison.output, "GN").mkdir(parents=True)
    Path(comparison.runs[2].folder).write_text("")
    assert run(comparison) == ["finished", "finished", "failed", "finished"]
    text = write_report(comparison)
    assert "3 of 4 runs finished" in text and f"- GN seed 1: failed: {comparison.runs[2].folder}" in text


def test_a_cut_run_without_evaluation_is_seen(job, small):
    comparison = small(["GN"], [0], ["SOLVER.MAX_ITER", "20", "DATASETS.TEST", "()"])
    list(train_all(Local(comparison)))
    path = Path(comparison.runs[0].path("metrics.json"))
    path.write_text('{"iteration": 19, "total_loss": 1.0}\n')
    assert comparison.state(comparison.runs[0]).status == "finished"
    path.write_text('{"iteration": 18, "total_loss": 1.0}\n')
    assert "ends with iteration 18, and a finished run's ends with 19" in comparison.state(comparison.runs[0]).reason


def compare(monkeypatch, comparison, *words):
    """Run the command of ``comparison`` in this process."""
    tool = importlib.import_module("compare")
    given = ["--norm-keys", *comparison.keys, "--norms", *comparison.norms, "--seeds", *map(str, comparison.seeds)]
    given += ["--config-file", comparison.config_file, "--output", comparison.output, *words, *comparison.overrides]
    monkeypatch.setattr("sys.argv", ["compare.py", *given])
    tool.main()


def test_a_run_that_cannot_begin_has_failed_for_the_tool_too(job, shapes, small, monkeypatch, capsys):
    """Its folder says nothing of it."""
    comparison = small(["GN", "PGN"], [0])
    Path(comparison.runs[1].folder).mkdir(parents=True)
    Path(comparison.runs[1].path("lock.0")).mkdir()
    with pytest.raises(InputError, match="1 of 2 runs failed"):
        compare(monkeypatch, comparison)
    printed = capsys.readouterr().out
    assert "- PGN seed 0: failed: " in printed and "output.txt" not in printed
    assert Path(comparison.output, "results.md").read_text() in printed


def test_runs_that_were_not_asked_for_are_named(job, shapes, small, monkeypatch, capsys):
    compare(monkeypatch, small(["GN", "PGN"], [0]))
    assert "Not in this report" not in capsys.readouterr().out
    compare(monkeypatch, small(["GN"], [0, 1]))
    assert "Not in this report, because they were not asked for: PGN/seed_0." in capsys.readouterr().out


def test_a_plan_for_a_folder_of_another_comparison_is_refused(small, monkeypatch):
    small().claim_output()
    with pytest.raises(InputError, match="SOLVER.MAX_ITER: 20 there, 30 here"):
        compare(monkeypatch, small(overrides=["SOLVER.MAX_ITER", "30"]), "--plan")


@pytest.mark.parametrize("flag", ["--parallel", "--num-gpus", "--num-machines"])
def test_a_number_of_nothing_is_refused(flag, small, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        compare(monkeypatch, small(), flag, "0")
    assert f"argument {flag}: 0: at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "a: [", "3"])
def test_a_damaged_comparison_is_named(text, small):
    comparison = small()
    comparison.claim_output()
    Path(comparison.output, "comparison.yaml").write_text(text)
    with pytest.raises(InputError, match="comparison.yaml, which says what the runs there share, is damaged"):
        comparison.claim_output()
