import pytest
from detectron2.modeling import build_model
from needs import KERNELS
from torch import nn

import gpu
from gng_d2.layers import WSConv2d
from gng_d2.models.fuse_norms import fuse_norms
from gng_d2.ops.backends import DEFAULT_KERNELS, enabled_kernels
from study import step_cost
from study.rows import read_rows
from study.step_cost import Setup

SMALL = gpu.SMALL.split()


@pytest.mark.slow
def test_the_five_setups():
    def norms(norm):
        model = build_model(step_cost.config_of("pfpn", norm, "cpu"))
        standardized = [module for module in model.modules() if isinstance(module, WSConv2d)]
        return model.backbone.bottom_up.stem.conv1.norm, model.backbone.fpn_output3.norm, standardized

    stem, fpn, standardized = norms("FrozenBN")
    assert not isinstance(stem, nn.GroupNorm) and fpn is None and not standardized
    stem, fpn, standardized = norms("PGN+WS")
    assert stem.num_groups == fpn.num_groups == 1 and len(standardized) == 53 + 8 + 7  # backbone, FPN, semantic head
    stem, _, standardized = norms("GN")
    assert stem.num_groups == 32 and not standardized


def one_round(calls, *_):
    for call in calls:
        call()
    return [[1.0 + place] * 3 for place in range(len(calls))]


@pytest.mark.slow
def test_the_tool(reproduce, line_of, tmp_path, monkeypatch):
    monkeypatch.setattr(step_cost, "keep_freed_memory", lambda: None)  # for good, in this process
    monkeypatch.setattr(step_cost, "rounds", one_round)
    path, fused = tmp_path / "rows.json", []
    monkeypatch.setattr(step_cost, "fuse_norms", lambda model: fused.append(fuse_norms(model)))
    command = [
        "step-cost",
        "--models",
        "pfpn",
        "--size",
        64,
        "96",
        "--device",
        "cpu",
        "--seconds",
        0.01,
        "--json",
        path,
    ]
    out = reproduce(*command, *SMALL)
    rows = read_rows(path, step_cost.StepCostRow)
    assert [row.setup() for row in rows] == list(step_cost.SETUPS)
    assert len(fused) == 3
    times = {row.setup(): row.step_milliseconds for row in rows}
    for row in rows:
        assert row.ratio_to_gn == pytest.approx(row.step_milliseconds / times[Setup("GN")])
        assert (row.ratio_to_kept is not None) == row.recomputed
        low, high = row.quartiles_to_pytorch
        assert low <= high and (row.kernels or low == high == 1)
        assert row.peak_memory_bytes is row.memory_ratio_to_gn is None  # CUDA only
        assert (row.share_of_weight_standardization > 0) == row.norm.endswith("+WS")
    line = line_of(out, "pfpn    | PGN     ")
    assert line[:5] == ["pfpn", "PGN", "False", "1", "64 x 96"] and line[5] == f"{times[Setup('PGN')]:.3f}"
    for words in ("GN+WS, PyTorch's ops", "PGN+WS, fused ", "PGN+WS, fused, recomputed"):
        assert line_of(out, f"pfpn    | {words}".rstrip())

    monkeypatch.setattr(step_cost, "step_rows", None)  # would be called
    assert reproduce(*command, "--resume", *SMALL) == out and read_rows(path, step_cost.StepCostRow) == rows
    with pytest.raises(TypeError):  # rows of other overrides are others
        reproduce(*command, "--resume", *SMALL, "SOLVER.BASE_LR", "0.01")


@KERNELS
def test_our_kernels_are_off_where_pytorchs_ops_are_measured():
    seen = []

    class Trainer:
        def run_step(self):
            seen.append(enabled_kernels())

    for kernels in ("cuda", "off"):
        job = object.__new__(step_cost._Job)
        job.kernels, job.trainer = kernels, Trainer()
        job.step()
    assert seen == ["cuda", "off"] and enabled_kernels() == DEFAULT_KERNELS


def test_mixed_precision_on_a_cpu_is_refused(reproduce):
    with pytest.raises(SystemExit, match="error: --precision amp: Detectron2's AMP needs CUDA"):
        reproduce("step-cost", "--device", "cpu", "--precision", "amp")
