from functools import partial

import pytest
import torch
from needs import KERNELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gng_d2.ops import cpu_kernels, standardize_weight, weight_standardization, weight_standardization_cpu
from gng_d2.ops.weight_standardization import _standardize

pytestmark = pytest.mark.gpu


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


@KERNELS
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


@KERNELS
@pytest.mark.parametrize("road", ["cpu", "triton"])
def test_kernels_on_equal_weights(road):
    kernels, device = kernels_of(road)
    weight, gradient = torch.full((4, 3, 3, 3), 0.25, device=device), torch.randn(4, 3, 3, 3, device=device)
    assert not kernels.forward(weight, 1e-5).any()
    expected = (gradient - gradient.mean((1, 2, 3), keepdim=True)) / 1e-5
    torch.testing.assert_close(kernels.backward(gradient, weight, 1e-5), expected, rtol=1e-5, atol=1e-2)


@KERNELS
@pytest.mark.parametrize("road", ["cpu", "triton"])
def test_autograd_takes_the_kernels(road, monkeypatch):
    kernels, device = kernels_of(road)
    calls = []
    library = torch.library.Library("gng_d2", "IMPL")
    forward, backward = weight_standardization._forward, weight_standardization._backward
    for op, kernel in ("standardize", partial(forward, kernels)), ("standardize_backward", partial(backward, kernels)):
        spy = partial(lambda op, kernel, *args: calls.append(op) or kernel(*args), op, kernel)
        library.m.impl(op, device.upper(), spy)
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


@KERNELS
def test_kernels_are_for_plain_eager_tensors():
    weight = torch.randn(4, 3, 3, 3)
    backend, expected = (
        weight_standardization._backend,
        weight_standardization_cpu if cpu_kernels.is_compiled() else None,
    )
    assert backend(weight) is backend(nn.Parameter(weight)) is backend(weight.transpose(0, 1)) is expected
    assert not any(map(backend, (weight.double(), weight.half(), weight[:0])))
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
@KERNELS
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts():
    scripted = torch.jit.script(standardize_weight)
    weight = torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(scripted(weight), standardize_weight(weight))
