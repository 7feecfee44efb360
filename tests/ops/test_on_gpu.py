"""What the interpreter cannot show: the kernels at full size, and what runs them on a GPU."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gng_d2
from gng_d2.ops import backends, group_norm
from study.detector_norms import detector_norms

triton_kernels = pytest.importorskip("gng_d2.ops.group_norm_triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def forward(x, weight, bias, num_groups):
    mean, rstd = triton_kernels.statistics(x, num_groups, 1e-5)
    return triton_kernels.apply(x, mean, rstd, weight, bias, num_groups), mean, rstd


def relative_error(one, other):
    return ((one.double() - other).norm() / other.norm()).item()


def test_triton_compiles_here():
    assert not os.environ.get("TRITON_INTERPRET")
    assert backends.triton_works(torch.cuda.current_device())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_the_norms_of_a_detector(dtype, most, layout):
    for shape, num_groups in detector_norms(2, 800, 1216):
        x, dy = (torch.randn(shape, device="cuda").to(dtype, memory_format=layout) for _ in range(2))
        weight = torch.randn(shape[1], device="cuda").to(dtype)
        y, mean, rstd = forward(x, weight, None, num_groups)
        dx, dweight, _, _ = triton_kernels.backward(dy, x, mean, rstd, weight, num_groups)
        leaves = [t.double().requires_grad_() for t in (x, weight)]
        exact = F.group_norm(leaves[0], num_groups, leaves[1])
        gradients = torch.autograd.grad(exact, leaves, dy.double())
        errors = [relative_error(*pair) for pair in zip((y, dx, dweight), (exact.detach(), *gradients))]
        assert max(errors) < most, (shape, num_groups, errors)


@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    side = 2**15
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of GPU memory")
    x = torch.randn(1, 2, side + 32, side, device="cuda", dtype=torch.float16)
    y, mean, _ = forward(x, None, None, 2)
    channel = x[0, 1].float()
    assert x.numel() > 2**31
    torch.testing.assert_close(mean[0, 1], channel.mean(), rtol=1e-3, atol=1e-5)
    expected = (channel[-8:] - channel.mean()) * (channel.var(correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(y[0, 1, -8:].float(), expected, rtol=2e-3, atol=2e-3)


def test_autocast_keeps_float16():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), gng_d2.PracticalGroupNorm(64, 3)).cuda()
    x = torch.randn(2, 3, 130, 130, device="cuda")
    with torch.autocast("cuda", torch.float16):
        y = model(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), model(x), rtol=1e-2, atol=1e-2)
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def large_input():
    """One that the rule gives to our kernels, with its affine."""
    x = torch.randn(2, 64, 200, 304, device="cuda")
    return x, *(torch.randn(64, device="cuda") for _ in range(2))


@pytest.mark.slow
def test_inductor_goes_through_the_op():
    x, weight, bias = large_input()

    def function(x):
        return group_norm(x.relu(), 1, weight, bias).square()

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x), rtol=1e-4, atol=1e-4)


def test_a_cuda_graph_replays_it():
    x, weight, bias = large_input()
    expected = [group_norm(x, 1, weight, bias), group_norm(x + 1, 2, weight, bias)]  # which compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = [group_norm(x, 1, weight, bias), group_norm(x + 1, 2, weight, bias)]
    for tensor in replayed:
        tensor.zero_()
    graph.replay()
    torch.testing.assert_close(replayed, expected)
