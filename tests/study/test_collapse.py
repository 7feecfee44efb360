"""What a norm receives and loses, compared with sums over lists of numbers."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pvariance

import pytest
import torch
from torch import nn

from gng_d2 import GroupNorm
from gng_d2.errors import InputError
from gng_d2.job.build import build
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.layers import LearnedGroupNorm
from gng_d2.ops import group_sizes
from study import collapse
from study.collapse import CollapseRow
from study.comparison import Run, RunState
from study.rows import read_rows


def inputs():
    """Three images, and the same images in two batches."""
    x = torch.randn(3, 8, 4, 5) + torch.randn(8, 1, 1) + torch.randn(3, 8, 1, 1)
    return x, [x[:2], x[2:]]


def measured(norm, calls):
    """What ``norm`` has received as part of a model that sees the inputs in ``calls``."""
    found = collapse.measure(nn.Sequential(norm), calls)
    assert not norm._forward_pre_hooks
    return found["0"]


def test_constant_power():
    x, calls = inputs()
    constant, power = 0, 0
    for channel in x.double().transpose(0, 1):
        numbers = channel.flatten().tolist()
        constant += fmean(numbers) ** 2
        power += fmean(number**2 for number in numbers)
    assert measured(GroupNorm(2, 8), calls).constant() == pytest.approx(constant / power, rel=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_lost_means_of_images(groups):
    x, calls = inputs()
    size = 8 // groups
    means = [[fmean(channel.flatten().tolist()) for channel in image] for image in x.double()]
    left = [[m - fmean(image[c // size * size :][:size]) for c, m in enumerate(image)] for image in means]
    own, kept = (sum(map(pvariance, zip(*images))) for images in (means, left))
    assert measured(GroupNorm(groups, 8), calls).lost() == pytest.approx(1 - kept / own, abs=1e-12)
    norm = LearnedGroupNorm(8)
    with torch.no_grad():
        norm.logits[0, group_sizes(8).index(size)] = 100
    assert measured(norm, calls).lost() == pytest.approx(1 - kept / own, abs=1e-6)


def test_images_that_are_the_same_lose_nothing_that_can_be_measured():
    x = torch.ones(2, 4, 3, 3)
    found = measured(GroupNorm(2, 4), [x])
    assert found.lost() is None and found.constant() == 1


def test_norms_of_the_batch_and_norms_not_reached_are_left_out():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    model.other = nn.GroupNorm(2, 4)
    model.forward = lambda x: model[1](model[0](x))
    model.train()
    assert list(collapse.measure(model, [torch.randn(2, 4, 3, 3)])) == ["1"]
    assert model.training and model[0].num_batches_tracked == 0


def row(run, seed, constant, under_test=True):
    return CollapseRow(run, seed, "head.norm", under_test, constant, 0.25, 32, "this")


def test_table(line_of):
    rows = [row("GN", 0, 0.2), row("GN", 1, 0.4), row("GN", 1, 0.9, under_test=False)]
    assert line_of(collapse.table(rows), "GN") == ["GN", "2", "1", "0.300 ± 0.141", "0.250 ± 0.000"]


def test_mixture_table(line_of):
    """The geometric mean of 1 and 4 channels with equal weights is 2."""
    rows = [
        replace(row("LGN", seed, 0.2), mixtures=[[1, first, 0.0], [4, 1 - first, 1.0]])
        for seed, first in ((0, 0.25), (1, 0.75))
    ]
    cells = line_of(collapse.mixture_table([*rows, row("GN", 0, 0.2)]), "LGN")
    assert cells == ["LGN", "head", "2", "2.0 (0.50, 0.50)", "4.0 (0.00, 1.00)"]


def test_mixtures_are_those_that_the_norm_learned():
    norm = LearnedGroupNorm(4)
    with torch.no_grad():
        norm.logits.copy_(torch.tensor([[100, 0, 0], [0, 0, 100]]))
    assert collapse._mixtures(norm) == [(1, 1, 0), (2, 0, 0), (4, 0, 1)]
    assert collapse._mixtures(norm.requires_grad_(False)) is None and collapse._mixtures(nn.GroupNorm(2, 4)) is None


def test_other_folders_are_refused(reproduce, tmp_path):
    with pytest.raises(InputError, match="is no folder of tools/compare.py"):
        collapse.runs_with_weights(str(tmp_path))
    (tmp_path / "comparison.yaml").write_text("config: {}")
    run = Run("GN", 0, str(tmp_path / "GN" / "seed_0"))
    os.makedirs(run.folder)
    Path(run.path("model_final.pth")).write_bytes(b"")
    run.record(RunState("failed"))
    with pytest.raises(InputError, match="no run in .* is finished"):
        collapse.runs_with_weights(str(tmp_path))
    run.record(RunState("finished"))
    assert collapse.runs_with_weights(str(tmp_path)) == [(run.path("config.yaml"), run.path("model_final.pth"), set())]
    with pytest.raises(SystemExit, match="two or more"):
        reproduce("collapse", "--runs", tmp_path, "--images", 1)


def test_a_run_without_test_images_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("DATASETS: {TEST: []}")
    with pytest.raises(InputError, match="config.yaml: DATASETS.TEST is empty"):
        collapse.measure_run(str(tmp_path / "config.yaml"), "model_final.pth", set(), 2)


@pytest.mark.slow
def test_the_tool(shapes, small, reproduce, tmp_path):
    comparison = small(norms=("GN", "GN/1+WS"), seeds=(0,))
    comparison.claim_output()
    for run in comparison.runs:
        os.makedirs(run.folder)
        cfg = comparison.norm_cfg(run.norm)
        cfg.merge_from_list(["SEED", run.seed, "OUTPUT_DIR", run.folder])
        Checkpointer(build(cfg), run.folder).save("model_final")
        with open(run.path("config.yaml"), "w") as file:
            file.write(cfg.dump())
        run.record(RunState("finished"))
    path, picture = tmp_path / "rows.json", tmp_path / "plot.png"
    reproduce("collapse", "--runs", comparison.output, "--images", 2, "--json", path, "--plot", picture)
    rows = read_rows(path, CollapseRow)
    assert [row.run for row in rows if row.under_test] == ["GN"] * 7 + ["GN/1+WS"] * 7
    assert all(row.name.startswith("sem_seg_head.") == row.under_test and 0 <= row.constant <= 1 for row in rows)
    # in this head of 32 channels GN is instance norm too
    assert all(row.lost == pytest.approx(1) for row in rows if row.under_test)
    assert any(row.lost < 0.9 for row in rows if not row.under_test)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="GN/seed_0/model_final.pth have the same norms and the same seed"):
        shutil.copytree(comparison.output, tmp_path / "again")
        reproduce("collapse", "--runs", comparison.output, tmp_path / "again", "--images", 2)
    mixed = {"MODEL.SEM_SEG_HEAD.NORM", "MODEL.FPN.NORM", "MODEL.RESNETS.NORM"}
    run = comparison.runs[1]
    rows = collapse.measure_run(run.path("config.yaml"), run.path("model_final.pth"), mixed, 2)
    assert {row.run for row in rows} == {"GN, GN/1+WS"}
