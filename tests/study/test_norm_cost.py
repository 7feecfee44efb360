import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from gng_d2.config import load_config
from gng_d2.layers import WSConv2d
from study import norm_cost as benchmark_norm
from study import step_cost as benchmark_train

KEYS = {
    *("shape", "num_groups", "dtype", "direction", "implementation"),
    *("milliseconds", "ratio_to_native_gn32", "fraction_of_copy_bandwidth"),
}


def test_inputs_are_those_of_the_real_model():
    """The same as a real forward pass on the CPU gives."""
    overrides = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.WEIGHTS '' MODEL.FPN.OUT_CHANNELS 32"
    cfg = load_config(
        "configs/pfpn_pgn.yaml", [*overrides.split(), "MODEL.RESNETS.NORM", "PGN", "MODEL.FPN.NORM", "GN"]
    )
    found = benchmark_norm.norm_inputs(cfg, 1, 64, 96)
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
    inputs = benchmark_norm.norm_inputs(cfg, 2, 800, 1216)
    assert ((1024, 256, 7, 7), 1) in inputs and ((2, 64, 400, 608), 1) in inputs and ((2, 64, 200, 304), 64) in inputs
    assert len(set(inputs)) == len(inputs)


def test_rows_of_a_norm():
    rows = list(benchmark_norm.norm_rows((1, 64, 9, 9), 2, torch.float32, True, "cpu", 1e10, 0.001))
    assert all(set(KEYS) <= row.keys() and row["milliseconds"] > 0 for row in rows)
    native = {row["direction"]: row for row in rows if row["implementation"] == "native_gn32"}
    for row in rows:
        reference = native[row["direction"]]["milliseconds"]
        assert row["ratio_to_native_gn32"] == pytest.approx(row["milliseconds"] / reference)
        passes = {"forward": 3, "forward+backward": 8}[row["direction"]]
        assert row["fraction_of_copy_bandwidth"] == pytest.approx(
            passes * 64 * 81 * 4 / 1e10 / (row["milliseconds"] / 1e3)
        )
    assert {row["implementation"] for row in rows} >= {"ours", "native", "native_gn32_again", "frozen_bn", "var_mean"}


def test_implementations_compute_group_norm():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 12, 5, 7) + 3, torch.randn(12), torch.randn(12)
    for name, (function, _) in benchmark_norm.implementations("cpu").items():
        expected = F.group_norm(x, 3, weight, bias)
        if name == "frozen_bn":
            expected = F.batch_norm(x, torch.zeros(12), torch.ones(12), weight, bias, eps=0)
        torch.testing.assert_close(function(x, 3, weight, bias), expected)


def test_the_five_setups():
    def norms(norm):
        model = build_model(benchmark_train.config_of("pfpn", norm, "cpu"))
        standardized = [module for module in model.modules() if isinstance(module, WSConv2d)]
        return model.backbone.bottom_up.stem.conv1.norm, model.backbone.fpn_output3.norm, standardized

    stem, fpn, standardized = norms("FrozenBN")
    assert not isinstance(stem, nn.GroupNorm) and fpn is None and not standardized
    stem, fpn, standardized = norms("PGN+WS")
    assert stem.num_groups == fpn.num_groups == 1 and len(standardized) == 53 + 8 + 7  # backbone, FPN, semantic head
    stem, _, standardized = norms("GN")
    assert stem.num_groups == 32 and not standardized


def test_rows_of_a_step():
    small = (
        "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 32 "
        "MODEL.ROI_BOX_HEAD.FC_DIM 32 "
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.SEM_SEG_HEAD.CONVS_DIM 32"
    )
    rows = list(benchmark_train.step_rows("pfpn", False, 1, 64, 96, "cpu", 0.01, small.split()))
    assert [row["norm"] for row in rows] == list(benchmark_train.NORMS)
    times = {row["norm"]: row["step_milliseconds"] for row in rows}
    for row in rows:
        assert row["ratio_to_gn"] == pytest.approx(times[row["norm"]] / times["GN"])
        assert row["peak_memory_bytes"] is row["memory_ratio_to_gn"] is None  # CUDA only
        assert (row["share_of_weight_standardization"] > 0) == row["norm"].endswith("+WS")
