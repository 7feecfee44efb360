from statistics import geometric_mean

import pytest
import torch
from needs import KERNELS
from torch.nn import functional as F

from gng_d2.ops import cpu_kernels, learned_group_norm
from study import norm_cost
from study.norm_cost import NormCostRow
from study.rows import read_rows, write_rows


def test_rows_of_a_norm():
    rows = list(norm_cost.norm_rows((1, 64, 9, 9), 2, torch.float32, True, "cpu", 1e10, 0.001))
    assert all(row.milliseconds > 0 and row.layout == "channels_last" for row in rows)
    native = {row.direction: row for row in rows if row.implementation == "native_gn32"}
    for row in rows:
        reference = native[row.direction].milliseconds
        assert row.ratio_to_native_gn32 == pytest.approx(row.milliseconds / reference)
        passes = {"forward": 3, "forward+backward": 8}[row.direction]
        assert row.fraction_of_copy_bandwidth == pytest.approx(passes * 64 * 81 * 4 / 1e10 / (row.milliseconds / 1e3))
        low, high = row.ratio_quartiles
        assert low <= high and (row.implementation != "native_gn32" or low == high == 1)
        assert row.kernels is (False if row.implementation == "ours" else None)
    assert {row.implementation for row in rows} >= {"ours", "native", "native_gn32_again", "frozen_bn", "var_mean"}


def test_rows_of_a_norm_with_what_follows_it():
    for after, passes in (("relu", [3, 8]), ("add_relu", [4, 11])):
        rows = list(
            norm_cost.norm_rows((1, 64, 9, 9), 2, torch.float32, False, "cpu", 1e10, 0.001, ["frozen_bn"], after)
        )
        names = {"ours", "native", "native_gn32", "native_gn32_again", "frozen_bn", "frozen_bn_one_pass", "fused"}
        assert {row.implementation for row in rows} == names and all(row.after == after for row in rows)
        fused = [row for row in rows if row.implementation == "fused"]
        for row, count in zip(fused, passes, strict=True):
            assert row.fraction_of_copy_bandwidth == pytest.approx(
                count * 64 * 81 * 4 / 1e10 / (row.milliseconds / 1e3)
            )
            low, high = row.quartiles_to_ours
            assert low <= high
        assert all(row.quartiles_to_ours == [1, 1] for row in rows if row.implementation == "ours")


def test_what_follows_a_norm_is_computed():
    """Values and gradients of all implementations; those of a frozen norm are those of its affine map."""
    x, shortcut, dy = torch.randn(3, 2, 12, 5, 7)
    weight, bias = torch.randn(12), torch.randn(12)
    inputs = [t.requires_grad_() for t in (x, shortcut)]

    def values(run):
        y = run(x, 3, weight, bias)
        return y.detach(), *torch.autograd.grad(y, inputs, dy)

    frozen = values(norm_cost._then(norm_cost._frozen_batch_norm, shortcut))
    scale, shift = (t.view(1, -1, 1, 1) for t in (weight, bias))
    slope = (x * scale + shift + shortcut > 0) * dy
    expected = F.relu(x * scale + shift + shortcut), slope * scale, slope
    for found in (frozen, values(norm_cost._then(norm_cost._frozen_in_one_pass, shortcut))):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    without = norm_cost._then(F.group_norm, None)(x, 3, weight, bias)
    torch.testing.assert_close(without, F.relu(F.group_norm(x, 3, weight, bias)))


def test_what_is_in_l2_is_not_read_again():
    assert [norm_cost._passes(direction, 10, l2) for direction in norm_cost._PASSES for l2 in (10, 11)] == [3, 2, 8, 6]


@pytest.mark.skipif(not cpu_kernels.is_compiled(), reason="gng_d2 was installed without a C compiler")
@KERNELS
def test_whether_the_rule_chose_our_kernels():
    names = ["our_kernels"]
    rows = list(norm_cost.norm_rows((1, 64, 64, 64), 1, torch.float32, False, "cpu", 1e10, 0.0, names))
    assert {row.implementation for row in rows} == {"native_gn32", "native_gn32_again", "native", "ours", *names}
    assert [row.kernels for row in rows if row.implementation == "ours"] == [True, True]


@KERNELS
def test_implementations_compute_group_norm():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 12, 5, 7) + 3, torch.randn(12), torch.randn(12)
    for name, (function, _) in norm_cost.implementations("cpu").items():
        expected = F.group_norm(x, 3, weight, bias)
        if name == "frozen_bn":
            expected = F.batch_norm(x, torch.zeros(12), torch.ones(12), weight, bias, eps=0)
        elif name == "learned":
            expected = learned_group_norm(x, torch.full((2, 4), 1 / 4), weight, bias)
        torch.testing.assert_close(function(x, 3, weight, bias), expected)


@pytest.fixture
def two_inputs(monkeypatch):
    monkeypatch.setattr(norm_cost, "detector_norms", lambda *args: [((1, 32, 4, 4), 1), ((1, 64, 4, 4), 64)])
    monkeypatch.setattr(norm_cost, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(norm_cost, "keep_freed_memory", lambda: None)  # for good, in this process


def test_the_tool(two_inputs, reproduce, line_of, tmp_path):
    path = tmp_path / "rows.json"
    out = reproduce("norm-cost", "--device", "cpu", "--seconds", 0.001, "--json", path)
    rows = read_rows(path, norm_cost.NormCostRow)
    assert {tuple(row.shape) for row in rows} == {(1, 32, 4, 4), (1, 64, 4, 4)}
    ratios = [row.ratio_to_native_gn32 for row in rows if (row.implementation, row.direction) == ("ours", "forward")]
    expected = [f"{value:.2f}" for value in (geometric_mean(ratios), min(ratios), max(ratios))]
    assert line_of(out, "float32 | contiguous | forward          | ours       ")[4:] == expected


def test_the_tool_with_what_follows(two_inputs, reproduce, line_of, tmp_path):
    path = tmp_path / "rows.json"
    words = "norm-cost", "--device", "cpu", "--seconds", 0.001, "--json", path, "--resume"
    reproduce(*words)
    alone = read_rows(path, NormCostRow)
    out = reproduce(*words, "--after", "nothing", "relu", "--implementations", "frozen_bn")
    rows = read_rows(path, NormCostRow)
    assert rows[: len(alone)] == alone and {row.after for row in rows[len(alone) :]} == {"relu"}
    fused = [row.ratio_to_native_gn32 for row in rows if (row.implementation, row.direction) == ("fused", "forward")]
    assert line_of(out, "float32 | contiguous | forward          | fused, relu")[4] == f"{geometric_mean(fused):.2f}"
    assert line_of(out, "float32 | contiguous | forward          | ours        ")


def test_resumes_and_keeps_no_rows_of_another_machine(two_inputs, reproduce, tmp_path):
    path = tmp_path / "rows.json"
    words = "norm-cost", "--device", "cpu", "--seconds", 0.001, "--json", path, "--resume"
    reproduce(*words)
    whole = read_rows(path, NormCostRow)
    first = [row for row in whole if row.shape[1] == 32]
    write_rows(path, first)  # as if cut off after it
    reproduce(*words)
    resumed = read_rows(path, NormCostRow)
    assert resumed[: len(first)] == first and len(resumed) == len(whole)
    assert {row.shape[1] for row in resumed[len(first) :]} == {64}

    path.write_text(path.read_text().replace(first[0].machine, "another"))
    before = path.read_text()
    with pytest.raises(SystemExit, match="error: --resume: .*holds rows with machine another; here"):
        reproduce(*words)
    assert path.read_text() == before
