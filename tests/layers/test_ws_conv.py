import copy
import pickle
from functools import partial

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from gng_d2 import WSConv2d
from gng_d2.analysis import build_on_meta
from gng_d2.config import load_config
from gng_d2.errors import InputError
from gng_d2.ops import cpu_kernels, standardize_weight, weight_standardization, weight_standardization_cpu
from gng_d2.ops.weight_standardization import _standardize


def brute_force(weight):
    out = torch.empty(weight.shape, dtype=torch.float64)
    for i, w in enumerate(weight.double()):
        deviation = ((w - w.sum() / w.numel()).square().sum() / (w.numel() - 1)).sqrt()
        out[i] = (w - w.sum() / w.numel()) / (deviation + 1e-5)
    return out


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("scale, offset", [(1, 0), (1e-3, 0), (0.1, 1)])
def test_equals_the_definition(dtype, tolerance, scale, offset):
    torch.manual_seed(0)
    weight = (torch.randn(8, 5, 3, 3) * scale + offset).to(dtype)
    out = standardize_weight(weight)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), brute_force(weight), rtol=tolerance, atol=tolerance)


def test_half_weights_are_standardized_in_float32():
    # in float16 the deviation of such weights would be 0 or infinite
    weight = (torch.randn(4, 512, 3, 3, generator=torch.Generator().manual_seed(0)) * 2e-4 + 1e-2).half()
    torch.testing.assert_close(standardize_weight(weight).double(), brute_force(weight), rtol=2e-3, atol=2e-3)


def test_gradients():
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardize_weight, weight)
    assert torch.autograd.gradgradcheck(standardize_weight, weight)


def kernels_of(road):
    if road == "cpu":
        if not cpu_kernels.is_compiled():
            pytest.skip("gng_d2 was installed without a C compiler")
        return weight_standardization_cpu, "cpu"
    triton_kernels = pytest.importorskip("gng_d2.ops.weight_standardization_triton")
    return triton_kernels, "cuda" if torch.cuda.is_available() else "cpu"


ROADS = [("cpu", torch.float32), ("triton", torch.float32), ("triton", torch.float16), ("triton", torch.bfloat16)]


@pytest.mark.slow
@pytest.mark.parametrize("road, dtype", ROADS)
@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (3, 7, 5, 3), (2, 512, 3, 3), (30, 31, 1, 1)])
@pytest.mark.parametrize("scale, offset", [(1, 0), (1e-3, 0), (0.1, 1)])
def test_kernels_are_no_worse_than_pytorchs_ops(road, dtype, shape, scale, offset):
    """Weight and gradient, against float64."""
    kernels, device = kernels_of(road)
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn((2, *shape), generator=generator)
    weight, gradient = (weight * scale + offset).to(device, dtype), gradient.to(device, dtype)
    ours = kernels.forward(weight, 1e-5), kernels.backward(gradient, weight, 1e-5)
    assert ours[0].dtype == ours[1].dtype == dtype

    def composed(dtype):
        leaf = weight.to(dtype).requires_grad_()
        out = _standardize(leaf)
        return out.detach(), torch.autograd.grad(out, leaf, gradient.to(dtype))[0]

    theirs = composed(dtype)
    if dtype == torch.bfloat16 and device == "cpu":  # Triton's interpreter cuts off where a GPU rounds
        theirs = [(t.view(torch.int32) & -(2**16)).view(torch.float32) for t in composed(torch.float32)]
    for one, other, exact in zip(ours, theirs, composed(torch.float64)):
        assert (one - exact).norm() <= 1.2 * (other - exact).norm() + 2e-7 * exact.norm()


@pytest.mark.parametrize("road", ["cpu", "triton"])
def test_kernels_on_equal_weights(road):
    kernels, device = kernels_of(road)
    weight, gradient = torch.full((4, 3, 3, 3), 0.25, device=device), torch.randn(4, 3, 3, 3, device=device)
    assert not kernels.forward(weight, 1e-5).any()
    expected = (gradient - gradient.mean((1, 2, 3), keepdim=True)) / 1e-5
    torch.testing.assert_close(kernels.backward(gradient, weight, 1e-5), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("road", ["cpu", "triton"])
def test_autograd_takes_the_kernels(road, monkeypatch):
    kernels, device = kernels_of(road)
    calls = []
    library = torch.library.Library("gng_d2", "IMPL")
    forward, backward = weight_standardization._forward, weight_standardization._backward
    for op, kernel in ("standardize", partial(forward, kernels)), ("standardize_backward", partial(backward, kernels)):
        spy = partial(lambda op, kernel, *args: calls.append(op) or kernel(*args), op, kernel)
        library.impl(op, spy, device.upper(), allow_override=True)
    monkeypatch.setattr(weight_standardization, "_backend", lambda weight: kernels)
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    ours, theirs = (torch.autograd.grad(f(weight).cos().sum(), weight)[0] for f in (standardize_weight, _standardize))
    torch.testing.assert_close(ours, theirs)
    assert calls == ["standardize", "standardize_backward"]

    def second(f):
        first = torch.autograd.grad(f(weight).cos().sum(), weight, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), weight)[0]

    torch.testing.assert_close(second(standardize_weight), second(_standardize))
    library._destroy()


def test_kernels_are_for_plain_eager_tensors():
    weight = torch.randn(4, 3, 3, 3)
    backend, expected = (
        weight_standardization._backend,
        weight_standardization_cpu if cpu_kernels.is_compiled() else None,
    )
    assert backend(weight) is backend(nn.Parameter(weight)) is expected
    assert not any(map(backend, (weight.double(), weight.half(), weight.transpose(0, 1), weight[:0])))
    with FakeTensorMode():
        assert standardize_weight(torch.empty(4, 3, 3, 3)).shape == weight.shape
    assert standardize_weight(torch.empty(4, 3, 3, 3, device="meta")).is_meta
    gradient = torch.func.grad(lambda w: standardize_weight(w).cos().sum())(weight)
    torch.testing.assert_close(gradient, torch.func.grad(lambda w: _standardize(w).cos().sum())(weight))
    compiled = torch.compile(standardize_weight, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(weight), standardize_weight(weight))
    torch.testing.assert_close(make_fx(standardize_weight)(weight)(2 * weight + 1), standardize_weight(2 * weight + 1))


def test_jacobian():
    weight = torch.randn(3, 2, 2, 2)
    ours, theirs = (
        torch.autograd.functional.jacobian(f, weight, vectorize=True) for f in (standardize_weight, _standardize)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not cpu_kernels.is_compiled(), reason="gng_d2 was installed without a C compiler")
def test_the_ops_keep_pytorchs_rules():
    weight, gradient = torch.randn(2, 4, 3, 3, 3)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.gng_d2.standardize.default, (weight, 1e-5), test_utils=tests)
    torch.library.opcheck(torch.ops.gng_d2.standardize_backward.default, (gradient, weight, 1e-5), test_utils=tests)


@pytest.mark.parametrize("shape, expected", [((4, 3, 3, 3), 0.0), ((4, 1, 1, 1), 0.25)])
def test_constant_and_single_filters_are_finite(shape, expected):
    weight = torch.full(shape, 0.25, requires_grad=True)
    out = standardize_weight(weight)
    assert torch.equal(out, torch.full(shape, expected))
    (out * torch.randn(shape)).sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("name, groups", [("PGN+WS", 64), ("GN+WS", 32), ("GN16+WS", 16), ("GN1+WS", 1)])
def test_names_standardize_the_convolution_that_they_follow(name, groups):
    torch.manual_seed(0)
    conv = Conv2d(256, 64, 3, bias=False, norm=get_norm(name, 64), activation=F.relu)
    assert type(conv) is WSConv2d and isinstance(conv, Conv2d) and conv.norm.num_groups == groups
    assert name in conv.norm.norm_name() and "weight_standardization=True" in repr(conv)
    x = torch.randn(2, 256, 5, 5)
    expected = F.relu(F.group_norm(F.conv2d(x, brute_force(conv.weight).float()), groups))
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
    with pytest.raises(InputError, match=rf"PGN\+WS cannot follow a {type(layer).__name__}.*Use PGN there"):
        nn.Sequential(layer, get_norm("PGN+WS", 4))


class DeformConv(nn.Module):
    """Takes its norm before it makes its weight, as Detectron2's does, which needs compiled code."""

    def __init__(self, norm):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = 256, 64, (3, 3)
        self.norm = norm
        self.weight = nn.Parameter(torch.zeros(64, 256, 3, 3))


def test_deformable_convolution():
    assert DeformConv(get_norm("PGN", 64)).norm.num_groups == 64
    with pytest.raises(InputError, match=r"GN\+WS cannot follow a DeformConv"):
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts():
    scripted = torch.jit.script(standardize_weight)
    weight = torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(scripted(weight), standardize_weight(weight))
