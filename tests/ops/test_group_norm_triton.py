"""The kernels: on a GPU where there is one, in Triton's interpreter otherwise."""

import pytest
import torch
from needs import KERNELS
from torch.nn import functional as F

pytest.importorskip("triton")

from gng_d2.ops import group_norm_triton

pytestmark = [pytest.mark.slow, pytest.mark.gpu, KERNELS]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def forward(x, weight, bias, num_groups):
    mean, rstd = group_norm_triton.statistics(x, num_groups, 1e-5)
    return group_norm_triton.apply(x, mean, rstd, weight, bias, num_groups), mean, rstd


def errors_of(shape, groups, dtype, channels_last=False, mean=0.0, std=1.0, affine=True):
    """Relative errors of output and gradients against float64: (ours, PyTorch's own op in the same type)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = (draw(*shape) * std + mean * std).to(DEVICE, dtype)
    dy = draw(*shape).to(DEVICE, dtype)
    if channels_last:
        x = x.contiguous(memory_format=FORMATS[len(shape)])
        dy = dy.contiguous(memory_format=FORMATS[len(shape)])
    weight, bias = (draw(shape[1]).to(DEVICE, dtype) for _ in range(2)) if affine else (None, None)

    y, m, r = forward(x, weight, bias, groups)
    ours = [y, *group_norm_triton.backward(dy, x, m, r, weight, groups)][: 4 if affine else 2]
    assert y.dtype == ours[1].dtype == dtype
    assert y.stride() == ours[1].stride() == x.stride()

    def pytorch(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
        y = F.group_norm(leaves[0], groups, *leaves[1:])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    exact = pytorch(torch.float64)
    return [
        tuple(((t.double() - e).norm() / e.norm()).item() for t in (one, other))
        for one, other, e in zip(ours, pytorch(dtype), exact)
    ]


def assert_no_worse(errors, factor=1.2, mean=0.0):
    for ours, theirs in errors:
        # the mean itself is rounded to float32
        assert ours <= factor * theirs + 2e-7 + 2**-24 * abs(mean), errors


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((1, 6, 5, 7), 1),
        ((2, 6, 5, 7), 3),
        ((2, 6, 5, 7), 6),
        ((1, 130, 3, 3), 13),
        ((2, 3, 48, 50), 1),
        ((1, 1, 9, 9), 1),
    ],
)
def test_relative_error_is_no_worse_than_pytorchs(shape, groups, dtype, channels_last):
    # the interpreter cuts bfloat16 off where a GPU rounds it
    factor = 2.4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1.2
    assert_no_worse(errors_of(shape, groups, dtype, channels_last), factor)


@pytest.mark.parametrize("shape, groups", [((5, 12), 4), ((2, 12, 31), 2), ((1, 6, 3, 4, 5), 3)])
def test_any_number_of_dimensions(shape, groups):
    assert_no_worse(errors_of(shape, groups, torch.float32))


def test_three_dimensions_channels_last():
    assert_no_worse(errors_of((1, 6, 3, 4, 5), 3, torch.float32, channels_last=True))


@pytest.mark.parametrize("mean, std", [(1000.0, 1.0), (100.0, 1e-3), (0.0, 1e4), (0.0, 1e-4), (-30.0, 1e3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_means_and_small_and_large_variances(mean, std, channels_last):
    """``mean`` is in standard deviations."""
    assert_no_worse(errors_of((2, 8, 33, 30), 2, torch.float32, channels_last, mean, std), mean=mean)


def test_without_affine():
    assert_no_worse(errors_of((2, 6, 5, 7), 2, torch.float32, affine=False))


@pytest.mark.parametrize("given", ["weight", "bias"])
def test_half_of_the_affine(given):
    torch.manual_seed(0)
    x, parameter = torch.randn(2, 4, 3, 3, device=DEVICE), torch.randn(4, device=DEVICE)
    y, _, _ = forward(x, *((parameter, None) if given == "weight" else (None, parameter)), 2)
    torch.testing.assert_close(y, F.group_norm(x, 2, **{given: parameter}))


@pytest.mark.parametrize("shape", [(1, 6, 140, 60), (2, 4, 70, 71)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_result_does_not_depend_on_the_number_of_chunks(shape, channels_last, monkeypatch):
    x = torch.empty(shape).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    chunks = set()
    for multiprocessors in (1, 3, 1000):
        monkeypatch.setattr(group_norm_triton, "_multiprocessors", lambda device: multiprocessors)
        chunks.add(group_norm_triton._Grid(x).num_chunks)
        assert_no_worse(errors_of(shape, 2, torch.float32, channels_last))
    assert len(chunks) > 1


def test_many_partial_results():
    assert_no_worse(errors_of((1, 1200, 6, 2), 1, torch.float32, channels_last=True, mean=3.0))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
def test_same_bits_from_run_to_run():
    torch.manual_seed(0)
    x, dy = torch.randn(2, 2, 8, 50, 50, device=DEVICE)
    weight = torch.randn(8, device=DEVICE)

    def run():
        y, mean, rstd = forward(x, weight, None, 1)
        return y, mean, rstd, *group_norm_triton.backward(dy, x, mean, rstd, weight, 1)[:3]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_a_nan_stays_in_its_group():
    x = torch.randn(2, 4, 6, 6, device=DEVICE)
    x[1, 3, 2, 2] = float("nan")
    y, _, _ = forward(x, None, None, 2)
    assert y[1, 2:].isnan().all() and not y[0].isnan().any() and not y[1, :2].isnan().any()
