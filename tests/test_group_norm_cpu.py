import pytest
import torch
from torch.nn import functional as F

from gng_d2.layers import group_norm, group_norm_cpu


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def draw(*shape, mean=0.0, std=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean * std
    weight, bias = torch.randn((2, shape[1]), generator=generator)
    return x.float(), weight, bias


def gradients(function, x, *parameters):
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))]


CASES = [
    ((1, 64, 128, 128), 1),
    ((1, 128, 121, 75), 1),
    ((1, 96, 128, 128), 3),
    ((3, 64, 80, 80), 1),
    ((1, 1024, 1100), 2),
    ((1, 64, 32, 32, 32), 1),
]


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.0, 100.0), (1.9, 1.0), (2.1, 1.0), (1000.0, 1.0), (0.0, 1e-4)])
@pytest.mark.parametrize("shape, groups", CASES)
def test_relative_error_is_no_worse_than_pytorchs(shape, groups, mean, std):
    """``mean`` is in standard deviations."""
    x, weight, bias = draw(*shape, mean=mean, std=std)
    assert group_norm_cpu.pays(x, groups)
    ours = gradients(lambda *t: group_norm(t[0], groups, *t[1:]), x, weight, bias)
    theirs = gradients(lambda *t: F.group_norm(t[0], groups, *t[1:]), x, weight, bias)
    exact = gradients(lambda *t: F.group_norm(t[0], groups, *t[1:]), x.double(), weight.double(), bias.double())
    for one, other, e in zip(ours, theirs, exact):
        assert (one - e).norm() <= 1.2 * (other - e).norm() + 2e-7 * e.norm()


@pytest.mark.parametrize("shape, groups", CASES)
def test_is_used_where_it_pays(shape, groups, monkeypatch):
    x, weight, bias = draw(*shape)
    used = []
    monkeypatch.setattr(torch, "native_batch_norm", _spy(torch.native_batch_norm, used))
    group_norm(x, groups, weight, bias)
    assert len(used) == 1
    group_norm(x + 5, groups, weight, bias)  # a large mean
    group_norm(x, 4 * groups, weight, bias)  # as many groups as threads
    group_norm(x.double(), groups, weight.double(), bias.double())
    group_norm(x[:, :, ::2], groups, weight, bias)
    if x.dim() == 4:
        group_norm(x.contiguous(memory_format=torch.channels_last), groups, weight, bias)
    torch.set_num_threads(1)
    group_norm(x, groups, weight, bias)
    assert len(used) == 1


def _spy(function, calls):
    def spy(*args):
        calls.append(args)
        return function(*args)

    return spy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_from_pytorch(value):
    x, weight, bias = draw(1, 64, 128, 128)
    x[0, 3, 5, 7] = value
    torch.testing.assert_close(group_norm(x, 2, weight, bias), F.group_norm(x, 2, weight, bias), equal_nan=True)


def test_constant_input():
    x = torch.full((1, 64, 128, 128), 3.0)
    torch.testing.assert_close(group_norm(x, 1), torch.zeros_like(x), atol=1e-4, rtol=0)
    assert not group_norm(torch.zeros_like(x), 1).any()


def test_without_affine():
    x, weight, _ = draw(1, 64, 128, 128)
    torch.testing.assert_close(group_norm(x, 1), F.group_norm(x, 1))
    torch.testing.assert_close(group_norm(x, 1, weight), F.group_norm(x, 1, weight))


def test_several_blocks(monkeypatch):
    monkeypatch.setattr(group_norm_cpu, "_BLOCK", 2**17)
    x, weight, bias = draw(3, 64, 80, 80)
    torch.testing.assert_close(group_norm(x, 1, weight, bias), F.group_norm(x, 1, weight, bias))


def test_rows_hold_the_group():
    assert group_norm_cpu._row_length(64 * 200 * 304) == 2048
    assert group_norm_cpu._row_length(2**21 + 17) is None  # a prime number
    assert all(n % group_norm_cpu._row_length(n) == 0 for n in (2**20, 512 * 25 * 38, 128 * 121 * 75))
