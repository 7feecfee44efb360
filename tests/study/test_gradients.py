from statistics import median

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F

from gng_d2.layers import GroupNorm, PracticalGroupNorm
from study.gradients import GradientRow, measure_blocks
from study.rows import read_rows


class Bottleneck(nn.Module):
    """As Detectron2's: ReLU in place, an addition in place after the last norm, an input with two takers."""

    def __init__(self, weight_standardization=False):
        super().__init__()

        def conv(n_in, n_out, norm, **kwargs):
            norm = norm(weight_standardization=weight_standardization)
            return Conv2d(n_in, n_out, bias=False, norm=norm, **kwargs).double()

        self.conv1 = conv(6, 4, lambda **kw: PracticalGroupNorm(4, **kw), kernel_size=1)
        self.conv2 = conv(4, 4, lambda **kw: GroupNorm(2, 4, **kw), kernel_size=3, stride=2, padding=1)
        self.conv3 = conv(4, 6, lambda **kw: GroupNorm(3, 6, **kw), kernel_size=1)
        self.shortcut = conv(6, 6, lambda **kw: GroupNorm(1, 6, **kw), kernel_size=1, stride=2)
        self.head = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.SiLU()).double()

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        out += self.shortcut(x)
        out = F.relu_(out)
        return self.head(out).pow(3).sum() + 2 * self.head(out[:, :, 1:]).sum()


def by_hand(model, x):
    """Each block's (input, function) as the model runs them, and the gradient at its output."""
    head = lambda x: model.head(x)  # noqa: E731
    relu1, relu2 = (lambda x: F.relu(model.conv1(x))), (lambda x: F.relu(model.conv2(x)))
    out1 = relu1(x)
    out2 = relu2(out1)
    out3, short = model.conv3(out2), model.shortcut(x)
    end = F.relu(out3 + short)
    cut = end[:, :, 1:]
    heads = head(end), head(cut)
    loss = heads[0].pow(3).sum() + 2 * heads[1].sum()
    outputs = out1, out2, out3, short, *heads
    gradients = torch.autograd.grad(loss, outputs)
    functions = relu1, relu2, model.conv3, model.shortcut, head, head
    names = "conv1.norm", "conv2.norm", "conv3.norm", "shortcut.norm", "head.1", "head.1"
    return zip(names, (x, out1, out2, x, end, cut), functions, gradients)


def brute_force(calls):
    """Var[J^T gradient] / Var[gradient] with the whole Jacobian J of a block, pooled over its calls."""
    passed, received = [], []
    for x, function, gradient in calls:
        matrix = jacobian(function, x.detach()).reshape(gradient.numel(), x.numel())
        passed.append(gradient.flatten() @ matrix)
        received.append(gradient.flatten())
    return (torch.cat(passed).var(unbiased=False) / torch.cat(received).var(unbiased=False)).item()


@pytest.mark.parametrize("weight_standardization", [False, True])
def test_blocks_against_their_whole_jacobians(weight_standardization):
    torch.manual_seed(0)
    model = Bottleneck(weight_standardization)
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64, requires_grad=True)
    blocks = measure_blocks(model, lambda: model(x * 1))
    expected = {}
    for name, *call in by_hand(model, x):
        expected.setdefault(name, []).append(call)
    ratios = {name: block.ratio for name, block in blocks.items()}
    assert ratios == pytest.approx({name: brute_force(calls) for name, calls in expected.items()}, rel=1e-9)
    assert {name: (block.fan_out, block.activation) for name, block in blocks.items()} == {
        "conv1.norm": (2, "relu"),
        "conv2.norm": (1, "relu"),
        "conv3.norm": (1, None),
        "shortcut.norm": (2, None),
        "head.1": (2, "silu"),
    }


def test_stride_of_2_passes_a_quarter():
    """The same gradient at each output on a quarter of the outputs, spread over the same input."""
    torch.manual_seed(0)
    ratios = []
    for stride in (1, 2):
        model = nn.Sequential(Conv2d(32, 16, 3, stride, 1, norm=GroupNorm(1, 16), activation=F.relu))
        x = torch.randn(8, 32, 16, 16).relu().requires_grad_()
        weights = torch.randn(8, 16, 16 // stride, 16 // stride)
        (block,) = measure_blocks(model, lambda: (model(x) * weights).sum()).values()
        assert block.activation == "relu" and block.fan_out == 1
        ratios.append(block.ratio)
    assert ratios[1] / ratios[0] == pytest.approx(1 / 4, rel=0.1)
    assert ratios[0] == pytest.approx(16 / 32, rel=0.2)


def test_blocks_without_a_gradient():
    conv, unused = (Conv2d(2, 2, 1, norm=nn.GroupNorm(1, 2)) for _ in range(2))
    model = nn.ModuleList([conv, unused])
    x = torch.randn(1, 2, 4, 4, requires_grad=True)

    def loss():
        unused(x)
        return (conv(x) * 0).sum()

    blocks = measure_blocks(model, loss)
    assert list(blocks) == ["0.norm"] and blocks["0.norm"].ratio is None
    assert measure_blocks(model, loss) == blocks and not conv._forward_pre_hooks and not conv.norm._forward_hooks


CONFIG = ["--config-file", "configs/quick/faster_rcnn_gn_ws.yaml"]


@pytest.mark.slow
def test_the_tool(shapes, reproduce, tmp_path):
    path, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    # 48 channels in FPN, which 32 groups do not divide, and a FrozenBN box head
    overrides = ["MODEL.FPN.OUT_CHANNELS", 48, "MODEL.FPN.NORM", "PGN+WS", "MODEL.ROI_BOX_HEAD.NORM", "FrozenBN",
                 "INPUT.MIN_SIZE_TRAIN", "(64,)"]  # fmt: skip
    out = reproduce("gradients", *CONFIG, "--images", 2, "--json", path, "--plot", plot, *overrides)
    assert plot.read_bytes().startswith(b"\x89PNG")
    by_setup = {}
    for row in read_rows(path, GradientRow):
        by_setup.setdefault(row.setup, {})[row.name] = row
    assert list(by_setup) == ["configured", "GN", "GN1", "PGN"]
    configured, gn, gn1, pgn = by_setup.values()
    conv = "backbone.bottom_up.res2.1.conv1.norm"
    assert [(s[conv].num_groups, s[conv].paper) for s in by_setup.values()] == [
        (32, 3.0), (32, 3.0), (1, 1.0625), (1, 1.0625)
    ]  # fmt: skip
    lateral, head = "backbone.fpn_lateral4.norm", "roi_heads.box_head.conv1.norm"
    assert (configured[lateral].num_groups, gn1[lateral].num_groups, pgn[lateral].num_groups) == (48, 1, 48)
    assert lateral not in gn and head not in gn and "GN: no figure for backbone.fpn_lateral" in out
    assert configured[head].num_groups is None and configured[head].paper is None
    assert configured[head].measured > 0
    down = configured["backbone.bottom_up.res3.0.conv1.norm"]
    assert (down.kernel_size, down.stride, down.fan_out, down.activation) == (3, 2, 3, "relu")
    assert down.kind == "stride above 1"
    last = configured["backbone.bottom_up.res3.0.conv2.norm"]
    assert last.activation is None and last.kind == "no activation"
    # GN and configured are the same in the backbone, another number of groups is not
    assert configured[conv].measured == pytest.approx(gn[conv].measured, rel=0.2)
    assert gn1[conv].measured != gn[conv].measured
    measured = [row.measured for row in pgn.values() if row.kind == "no activation"]
    (line,) = [line for line in out.splitlines() if line.startswith("| no activation  | PGN ")]
    assert line.split()[6] == str(len(measured)) and f"| {median(measured):.2f} (" in line


def test_outputs_are_refused_before_the_work(reproduce, tmp_path):
    with pytest.raises(SystemExit, match="error: cannot write .*: it is a folder"):
        reproduce("gradients", *CONFIG, "--json", tmp_path, "DATASETS.TRAIN", "()")
