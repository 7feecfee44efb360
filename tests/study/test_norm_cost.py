from statistics import geometric_mean

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from gng_d2.config import load_config
from study import norm_cost
from study.rows import read_rows


def test_inputs_are_those_of_the_real_model():
    """The same as a real forward pass on the CPU gives."""
    overrides = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.WEIGHTS '' MODEL.FPN.OUT_CHANNELS 32"
    cfg = load_config(
        "configs/pfpn_pgn.yaml", [*overrides.split(), "MODEL.RESNETS.NORM", "PGN", "MODEL.FPN.NORM", "GN"]
    )
    found = norm_cost.norm_inputs(cfg, 1, 64, 96)
    seen = []
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda norm, args, y: seen.append((tuple(y.shape), norm.num_groups)))
    with torch.no_grad():
        model.sem_seg_head.layers(model.backbone(torch.rand(1, 3, 64, 96)))
    assert found == list(dict.fromkeys(seen))
    assert ((1, 64, 32, 48), 1) in found and ((1, 32, 16, 24), 32) in found


def test_inputs_of_the_box_head():
    cfg = load_config("configs/faster_rcnn_pgn_ws.yaml")
    inputs = norm_cost.norm_inputs(cfg, 2, 800, 1216)
    assert ((1024, 256, 7, 7), 1) in inputs and ((2, 64, 400, 608), 1) in inputs and ((2, 64, 200, 304), 64) in inputs
    assert len(set(inputs)) == len(inputs)


def test_rows_of_a_norm():
    rows = list(norm_cost.norm_rows((1, 64, 9, 9), 2, torch.float32, True, "cpu", 1e10, 0.001))
    assert all(row.milliseconds > 0 and row.layout == "channels_last" for row in rows)
    native = {row.direction: row for row in rows if row.implementation == "native_gn32"}
    for row in rows:
        reference = native[row.direction].milliseconds
        assert row.ratio_to_native_gn32 == pytest.approx(row.milliseconds / reference)
        passes = {"forward": 3, "forward+backward": 8}[row.direction]
        assert row.fraction_of_copy_bandwidth == pytest.approx(passes * 64 * 81 * 4 / 1e10 / (row.milliseconds / 1e3))
    assert {row.implementation for row in rows} >= {"ours", "native", "native_gn32_again", "frozen_bn", "var_mean"}


def test_implementations_compute_group_norm():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 12, 5, 7) + 3, torch.randn(12), torch.randn(12)
    for name, (function, _) in norm_cost.implementations("cpu").items():
        expected = F.group_norm(x, 3, weight, bias)
        if name == "frozen_bn":
            expected = F.batch_norm(x, torch.zeros(12), torch.ones(12), weight, bias, eps=0)
        torch.testing.assert_close(function(x, 3, weight, bias), expected)


def test_the_tool(reproduce, line_of, tmp_path, monkeypatch):
    monkeypatch.setattr(norm_cost, "norm_inputs", lambda *args: [((1, 32, 4, 4), 1), ((1, 64, 4, 4), 64)])
    monkeypatch.setattr(norm_cost, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(norm_cost, "keep_freed_memory", lambda: None)  # for good, in this process
    path = tmp_path / "rows.json"
    out = reproduce("norm-cost", "--device", "cpu", "--seconds", 0.001, "--json", path)
    rows = read_rows(path, norm_cost.NormCostRow)
    assert {tuple(row.shape) for row in rows} == {(1, 32, 4, 4), (1, 64, 4, 4)}
    ratios = [row.ratio_to_native_gn32 for row in rows if (row.implementation, row.direction) == ("ours", "forward")]
    expected = [f"{value:.2f}" for value in (geometric_mean(ratios), min(ratios), max(ratios))]
    assert line_of(out, "float32 | contiguous | forward          | ours       ")[4:] == expected
