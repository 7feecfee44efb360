"""The norm that learns over how many channels it normalizes, in models and their tools."""

import copy
import logging

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.solver import get_default_optimizer_params
from needs import COMPILE, EXPORT, RECOMPUTE
from torch import nn

import gng_d2
from gng_d2.errors import InputError
from gng_d2.ops import learned_group_norm


def converted(norm="LGN", width=16):
    model = nn.Sequential(
        *[nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()],
        *[nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU()],
    )
    return gng_d2.convert_norms(model, norm, torch.randn(1, 3, 12, 12))


def learn(model):
    """Give each size of group another weight, as training does."""
    for norm in model.modules():
        if isinstance(norm, gng_d2.LearnedGroupNorm):
            nn.init.normal_(norm.logits, std=0.1)
    return model


def test_its_name_makes_it_and_it_has_the_name():
    norm = get_norm("LGN", 24)
    assert type(norm) is gng_d2.LearnedGroupNorm and norm.norm_name() == "LGN" and norm.is_bound()
    conv = Conv2d(3, 24, 3, norm=get_norm("LGN+WS", 24))
    assert type(conv) is gng_d2.WSConv2d and conv.norm.norm_name() == "LGN+WS"
    with pytest.raises(InputError, match=r"never met a weight layer .*no weight to standardize"):
        get_norm("LGN+WS", 24)(torch.randn(1, 24, 5, 5))


def test_each_size_counts_the_same_until_it_learns():
    norm = gng_d2.LearnedGroupNorm(24)
    uniform = pytest.approx({1: 0.2, 2: 0.2, 4: 0.2, 8: 0.2, 24: 0.2})
    assert norm.mixtures() == {"mean": uniform, "variance": uniform}
    with torch.no_grad():
        norm.logits[1, 2] = 0.1  # e to the 10 x 0.1 times the others' weight
    mixtures = norm.mixtures()
    assert mixtures["mean"] == uniform and mixtures["variance"][4] == pytest.approx(2.718282 * mixtures["variance"][1])
    x = torch.randn(2, 24, 5, 5)
    weights = torch.tensor([[*mixture.values()] for mixture in mixtures.values()])
    torch.testing.assert_close(norm(x), learned_group_norm(x, weights))


@pytest.mark.parametrize("size", [1, 24])
def test_it_learns_the_size_that_its_task_needs(size):
    """The targets are another norm's outputs, of single channels or of all."""
    norm, theirs = gng_d2.LearnedGroupNorm(24), nn.GroupNorm(24 // size, 24)
    optimizer = torch.optim.SGD(norm.parameters(), 0.1)
    for _ in range(100):
        x = torch.randn(4, 24, 6, 6) * torch.rand(24, 1, 1) + torch.randn(24, 1, 1)
        optimizer.zero_grad()
        (norm(x) - theirs(x)).square().mean().backward()
        optimizer.step()
    for mixture in norm.mixtures().values():
        assert max(mixture, key=mixture.get) == size and mixture[size] > 0.7


def test_reset_parameters_forgets_what_it_learned():
    norm = learn(gng_d2.LearnedGroupNorm(8, device="meta").to_empty(device="cpu"))
    norm.reset_parameters()
    assert norm.logits.eq(0).all() and norm.weight.eq(1).all() and norm.bias.eq(0).all()


def test_wrong_inputs_are_errors_that_name_it():
    model = nn.ModuleDict({"head": gng_d2.LearnedGroupNorm(8)})
    with pytest.raises(InputError, match=r"head: it takes inputs \(N, 8, \*\), not \(1, 6, 5, 5\)"):
        model["head"](torch.randn(1, 6, 5, 5))
    model["head"](torch.randn(1, 8, 1, 1))  # its larger groups hold more than one number
    with pytest.raises(InputError, match="would hold a single number"):
        gng_d2.LearnedGroupNorm(1)(torch.randn(1, 1, 1, 1))


def test_its_parameters_decay_as_those_of_a_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), gng_d2.LearnedGroupNorm(8))
    groups = get_default_optimizer_params(model, base_lr=1, weight_decay=0.5, weight_decay_norm=0)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decay[id(p)] for p in (model[0].weight, model[1].logits, model[1].weight)] == [0.5, 0, 0]


def test_checkpoints_say_that_it_learned_its_groups(caplog):
    learned, others = learn(converted()), converted("GN4")
    again = converted()
    again.load_state_dict(learned.state_dict())
    assert not caplog.records or all("trained" not in record.message for record in caplog.records)
    assert torch.equal(again[1].logits, learned[1].logits)
    caplog.clear()
    others.load_state_dict(learned.state_dict(), strict=False)
    again.load_state_dict(others.state_dict(), strict=False)
    messages = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert messages[0].startswith("1: 4 groups here, learned groups where its weights were trained")
    assert messages[1].startswith("1: learned groups here, 4 groups where its weights were trained")
    unbound = nn.Sequential(nn.Identity(), gng_d2.PracticalGroupNorm(16))
    unbound.load_state_dict({"1.weight": torch.ones(16), "1.bias": torch.ones(16)})
    state = nn.Sequential(nn.Identity(), gng_d2.LearnedGroupNorm(16)).state_dict()
    unbound.load_state_dict(state, strict=False)
    assert unbound[1].num_groups is None, "no number of groups to take"
    assert "1: a norm without groups here, learned groups where" in caplog.text


# converted models


def test_converting_there_and_back(caplog):
    model = learn(converted())
    before = {name: p for name, p in model.named_parameters()}
    gng_d2.convert_norms(model, "LGN", torch.randn(1, 3, 12, 12))
    assert all(p is before[name] for name, p in model.named_parameters()), "converting again changes nothing"
    gng_d2.convert_norms(model, "LGN+WS", torch.randn(1, 3, 12, 12))
    assert type(model[0]) is gng_d2.WSConv2d and model[1].logits is before["1.logits"]
    gng_d2.convert_norms(model, "GN/4", torch.randn(1, 3, 12, 12))
    assert type(model[0]) is nn.Conv2d and model[1].weight is before["1.weight"]
    assert not any("logits" in name for name in model.state_dict())
    assert type(model[1]) is gng_d2.GroupNorm and model[1].num_groups == 4


def test_converted_parameters_have_the_type_and_device_of_the_norms():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double()
    assert gng_d2.convert_norms(model, "LGN")[1].logits.dtype == torch.float64
    frozen = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).requires_grad_(False)
    assert not gng_d2.convert_norms(frozen, "LGN")[1].logits.requires_grad
    norm_alone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8).requires_grad_(False))
    assert not gng_d2.convert_norms(norm_alone, "LGN")[1].logits.requires_grad
    without_affine = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)).double()
    with torch.device("meta"):
        logits = gng_d2.convert_norms(without_affine, "LGN")[1].logits
    assert (logits.device.type, logits.dtype) == ("cpu", torch.float64)
    meta = nn.Sequential(nn.Conv2d(3, 8, 3, device="meta"), nn.BatchNorm2d(8, device="meta"))
    assert gng_d2.convert_norms(meta, "LGN")[1].logits.is_meta


def test_a_norm_of_timm_keeps_its_activation():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet26", num_classes=3)
    model.bn1 = timm.layers.BatchNormAct2d(64, act_layer=nn.SiLU)
    x = torch.randn(1, 3, 32, 32)
    gng_d2.convert_norms(model, "LGN", x)
    assert isinstance(model.bn1, gng_d2.LearnedGroupNorm) and isinstance(model.bn1.act, nn.SiLU)
    y = torch.randn(2, 64, 4, 4)
    plain = learned_group_norm(y, model.bn1.weights(), model.bn1.weight, model.bn1.bias)
    torch.testing.assert_close(model.bn1(y), nn.functional.silu(plain))
    model(x).sum().backward()
    assert all(norm.logits.grad is not None for norm in model.modules() if isinstance(norm, gng_d2.LearnedGroupNorm))


def test_its_row_in_the_table():
    model = converted(width=64)
    with torch.no_grad():
        model[4].logits[:, 2] = 10  # 4 channels a group
    rows = gng_d2.norm_table(model)
    assert [(row.norm, row.num_groups, row.channels_per_group) for row in rows] == [
        ("LGN", None, (8, 8)),
        ("LGN", None, (4, 4)),
    ]
    assert rows[0].isometry_ratio is None and "LGN" in str(rows)
    meta = gng_d2.norm_table(nn.Sequential(nn.Conv2d(3, 8, 3), gng_d2.LearnedGroupNorm(8, device="meta")))
    assert meta[0].channels_per_group is None


def test_calibrated_it_has_the_moments_of_the_batch_norm():
    reference = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).eval()
    nn.init.normal_(reference[1].bias)
    nn.init.uniform_(reference[1].weight, 0.5, 2)
    images = torch.randn(8, 3, 12, 12)
    model = gng_d2.convert_norms(copy.deepcopy(reference), "LGN", images, calibrate=images)
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(
            moment(model(images), (0, 2, 3)), moment(reference(images), (0, 2, 3)), rtol=1e-3, atol=1e-4
        )
    assert gng_d2.norm_table(model)[0].calibration_error > 0


def test_it_is_not_fused_and_does_not_become_plain():
    model = gng_d2.convert_norms(nn.Sequential(converted("GN4"), converted()), "GN4")
    gng_d2.convert_norms(model[1], "LGN")
    x = torch.randn(1, 3, 16, 16)
    expected = model[1](x[:, :, :12, :12])
    gng_d2.fuse_norms(model)
    torch.testing.assert_close(model[1](x[:, :, :12, :12]), expected)
    with pytest.raises(InputError, match=r"to_plain: PyTorch has no norm that computes what 1\.1 does, which is LGN"):
        gng_d2.to_plain(model)
    assert type(model[0][1]) is gng_d2.GroupNorm, "nothing was changed"


@RECOMPUTE
def test_recomputed_it_has_the_same_gradients():
    x = torch.randn(2, 3, 20, 20)
    plain = learn(converted())
    recomputed = gng_d2.recompute_norms(copy.deepcopy(plain))
    for _ in range(3):  # from the second run on outputs of convolutions are kept
        for model in (plain, recomputed):
            model.zero_grad()
            model(x).square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), recomputed.parameters()))


def test_bound_by_running_the_model():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = gng_d2.LearnedGroupNorm(8, weight_standardization=True), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.norm(self.conv(x))

    model = gng_d2.bind_norms(Swapped(), torch.randn(1, 3, 9, 9))
    assert type(model.conv) is gng_d2.WSConv2d and model.norm.in_channels == 3 and model.norm.num_groups is None
    folded = gng_d2.fold_weight_standardization(copy.deepcopy(model))
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize(
    "how", ["script", "trace", pytest.param("export", marks=EXPORT), pytest.param("compile", marks=COMPILE)]
)
def test_exported(how):
    model, x = learn(converted()).eval(), torch.randn(2, 3, 12, 12)
    if how == "export":
        made = torch.export.export(model, (x,)).module()
    elif how == "compile":
        made = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)


def test_symbolic_tracing_keeps_it_whole():
    graph = torch.fx.symbolic_trace(converted()).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4", "5"]
