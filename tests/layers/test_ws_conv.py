import copy
import logging
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torch.nn import functional as F

from gng_d2 import WSConv2d, bind_norms
from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from gng_d2.ops import standardize_weight


@pytest.mark.parametrize("name, groups", [("PGN+WS", 64), ("GN+WS", 32), ("GN16+WS", 16), ("GN1+WS", 1)])
def test_names_standardize_the_convolution_that_they_follow(name, groups):
    torch.manual_seed(0)
    conv = Conv2d(256, 64, 3, bias=False, norm=get_norm(name, 64), activation=F.relu)
    assert type(conv) is WSConv2d and isinstance(conv, Conv2d) and conv.norm.num_groups == groups
    assert name in conv.norm.norm_name() and "weight_standardization=True" in repr(conv)
    x = torch.randn(2, 256, 5, 5)
    expected = F.relu(F.group_norm(F.conv2d(x, standardize_weight(conv.weight)), groups))
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)


def test_plain_convolution_before_a_sibling_norm():
    block = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), get_norm("PGN+WS", 4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    assert type(block[0]) is WSConv2d and type(block[2]) is nn.Conv2d
    x = torch.randn(1, 6, 5, 5)
    torch.testing.assert_close(block[0](x), F.conv2d(x, standardize_weight(block[0].weight), block[0].bias, padding=1))


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.ConvTranspose2d(6, 4, 2), nn.Conv1d(6, 4, 3)], ids=lambda layer: type(layer).__name__
)
def test_other_layers_are_refused_by_name(layer):
    with pytest.raises(
        InputError, match=rf"PGN\+WS cannot follow a torch\.nn\.modules\.\w+\.{type(layer).__name__}.*Use PGN there"
    ):
        nn.Sequential(layer, get_norm("PGN+WS", 4))


def test_a_weight_that_begins_as_zero_is_one_warning(caplog):
    def zero(n_in, n_out):
        conv = nn.Conv2d(n_in, n_out, 1)
        nn.init.zeros_(conv.weight)
        return conv

    norms = get_norm("GN1+WS", 4), get_norm("PGN+WS", 4), get_norm("PGN", 4)
    model = nn.Sequential(nn.Conv2d(6, 4, 3, device="meta"), get_norm("GN1+WS", 4), zero(6, 4), norms[0])
    model.append(nn.Sequential(nn.Conv2d(4, 4, 1), norms[1], zero(4, 4), norms[2]))
    bind_norms(model[2:], torch.randn(1, 6, 5, 5))
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "all weights of this Conv2d are zero, and GN1+WS divides them" in message and "Use GN1 there" in message

    x = torch.randn(1, 6, 5, 5)
    gradients = [torch.autograd.grad(conv(x).sum(), conv.weight)[0] for conv in (model[2], zero(6, 4))]
    assert gradients[0].norm() > 1e4 * gradients[1].norm(), "what the warning says"


class DeformConv(nn.Module):
    """Takes its norm before it makes its weight, as Detectron2's does, which needs compiled code."""

    def __init__(self, norm):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = 256, 64, (3, 3)
        self.norm = norm
        self.weight = nn.Parameter(torch.zeros(64, 256, 3, 3))


def test_deformable_convolution():
    assert DeformConv(get_norm("PGN", 64)).norm.num_groups == 64
    with pytest.raises(InputError, match=r"GN\+WS cannot follow a tests\.\S+\.DeformConv"):
        DeformConv(get_norm("GN+WS", 64))


def test_a_norm_with_ws_that_met_no_layer_is_an_error():
    with pytest.raises(InputError, match=r"^0: this GN4\+WS never met .* no weight to standardize"):
        nn.Sequential(get_norm("GN4+WS", 8))(torch.randn(1, 8, 2, 2))


def test_only_what_the_norm_follows_is_standardized():
    model = build_on_meta(load_config("configs/faster_rcnn_pgn_ws.yaml"))
    ws = {name for name, m in model.named_modules() if isinstance(m, WSConv2d)}
    followed = {name for name, m in model.named_modules() if isinstance(m, Conv2d) and m.norm is not None}
    assert ws == followed
    assert not any("rpn" in name or "predictor" in name for name in ws)
    assert sum(name.startswith("roi_heads.box_head") for name in ws) == 4


def test_weight_stays_the_raw_parameter():
    torch.manual_seed(0)
    plain = Conv2d(12, 8, 3, norm=get_norm("PGN", 8))
    torch.manual_seed(0)
    ws = Conv2d(12, 8, 3, norm=get_norm("PGN+WS", 8))
    assert torch.equal(ws.weight, plain.weight)
    assert ws.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in ws.named_parameters()] == [n for n, _ in plain.named_parameters()]
    ws.load_state_dict(plain.state_dict())
    x = torch.randn(1, 12, 5, 5)
    for twin in (copy.deepcopy(ws), pickle.loads(pickle.dumps(ws))):
        assert torch.equal(twin(x), ws(x))
    torch.testing.assert_close(torch.jit.trace(ws, x)(x), ws(x))  # in PyTorch's own ops
    optimizer = torch.optim.SGD(ws.parameters(), lr=0.1, weight_decay=0.1)
    before = ws.weight.clone()
    ws(x).sum().backward()
    optimizer.step()
    assert not torch.equal(before, ws.weight)


def test_autocast_standardizes_in_float32():
    torch.manual_seed(0)
    conv = Conv2d(12, 8, 3, norm=get_norm("PGN+WS", 8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = standardize_weight(conv.weight)
        out = conv(torch.randn(1, 12, 5, 5))
    assert torch.equal(inside, standardize_weight(conv.weight)) and inside.dtype == torch.float32
    assert out.isfinite().all()
