import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from needs import HALF, KERNELS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from gng_d2.ops import cpu_kernels, group_norm, group_norm_cpu

pytestmark = [KERNELS, pytest.mark.usefixtures("threads")]
op_module = importlib.import_module("gng_d2.ops.group_norm")  # `gng_d2.ops.group_norm` is the function

if not cpu_kernels.is_compiled():
    assert not shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]), (
        "there is a C compiler: install gng_d2 again"
    )
    pytest.skip("gng_d2 was installed without a C compiler", allow_module_level=True)


def draw(*shape, mean=0.0, std=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean * std
    weight, bias = torch.randn((2, shape[1]), generator=generator)
    return x.float(), weight, bias


def gradients(function, x, *parameters):
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    y = function(*leaves)
    return [
        y.detach(),
        *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)),
    ]


def assert_no_worse_than_pytorchs(shape, groups, mean=0.0, std=1.0):
    x, weight, bias = draw(*shape, mean=mean, std=std)
    assert op_module._backend(x, groups, weight, bias, 1e-5) is group_norm_cpu
    ours = gradients(lambda *t: group_norm(t[0], groups, *t[1:]), x, weight, bias)
    theirs = gradients(lambda *t: F.group_norm(t[0], groups, *t[1:]), x, weight, bias)
    exact = gradients(lambda *t: F.group_norm(t[0], groups, *t[1:]), x.double(), weight.double(), bias.double())
    for one, other, e in zip(ours, theirs, exact):
        assert (one - e).norm() <= 1.2 * (other - e).norm() + 2e-7 * e.norm()


CASES = [
    ((1, 64, 128, 128), 1),
    ((1, 128, 121, 75), 1),
    ((1, 96, 128, 128), 3),
    ((3, 64, 80, 80), 1),
    ((1, 1024, 1100), 2),
    ((1, 64, 32, 32, 32), 1),
    ((2, 64, 100, 101), 16),
]


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.0, 100.0), (1000.0, 1.0), (0.0, 1e-4)])
@pytest.mark.parametrize("shape, groups", CASES)
def test_relative_error_is_no_worse_than_pytorchs(shape, groups, mean, std):
    """``mean`` is in standard deviations."""
    assert_no_worse_than_pytorchs(shape, groups, mean, std)


@pytest.mark.parametrize("shape", [(1, 96, 240, 240), (1, 95, 241, 243)])
def test_larger_than_the_caches(shape):
    assert_no_worse_than_pytorchs(shape, 1)


@pytest.mark.parametrize("piece", [1, 2, 7, 63, 126, 1000])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_of_several_pieces(groups, piece, monkeypatch):
    monkeypatch.setattr(group_norm_cpu, "PIECE", piece)
    x, weight, bias = draw(2, 6, 9, 7, mean=3)
    mean, rstd = group_norm_cpu.statistics(x, groups, 1e-5)
    y = group_norm_cpu.apply(x, mean, rstd, weight, bias, groups)
    theirs = torch.native_group_norm(x, weight, bias, 2, 6, 63, groups, 1e-5)
    torch.testing.assert_close((y, mean, rstd), theirs)
    dy = torch.cos(x)
    expected = torch.ops.aten.native_group_norm_backward(dy, x, mean, rstd, weight, 2, 6, 63, groups, [True] * 3)
    torch.testing.assert_close(group_norm_cpu.backward(dy, x, mean, rstd, weight, groups)[:3], expected)


def test_no_result_depends_on_the_number_of_threads():
    x, weight, bias = draw(2, 48, 75, 76)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        mean, rstd = group_norm_cpu.statistics(x, 3, 1e-5)
        y = group_norm_cpu.apply(x, mean, rstd, weight, bias, 3, "silu", x)
        results.append(
            [y, mean, rstd, *group_norm_cpu.backward(torch.cos(y), x, mean, rstd, weight, 3, "silu", bias, x)]
        )
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


THREADS = """
import importlib
import os
import torch
from gng_d2.ops import group_norm_cpu

torch.set_num_threads(4)
counts = [len(os.listdir("/proc/self/task"))]
x = torch.frombuffer(bytearray(2**22), dtype=torch.float32).view(1, 64, 128, 128)  # starts no thread
for call in (lambda: group_norm_cpu.statistics(x, 1, 1e-5), lambda: torch.sin(x)):
    call()
    counts.append(len(os.listdir("/proc/self/task")))
print(counts[1] - counts[0], counts[2] - counts[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in Linux's /proc")
def test_the_threads_are_pytorchs():
    """Ours starts three more, and PyTorch, which needs as many, none."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", THREADS], capture_output=True, text=True)
    assert result.stdout == "3 0\n", result.stdout + result.stderr


def test_a_library_of_another_system_or_version_is_not_used(monkeypatch):
    for origin in (__file__, torch._C.__file__):
        monkeypatch.setattr(cpu_kernels, "find_spec", lambda name: SimpleNamespace(origin=origin))
        with pytest.warns(UserWarning, match="installed again"):
            assert not cpu_kernels._load()


def test_is_used_where_it_is_faster():
    def uses(x, *args):
        leaf = x.detach().requires_grad_()
        return type(group_norm(leaf, *args).grad_fn).__name__ == "_GroupNormBackward"

    x, weight, bias = draw(1, 64, 128, 128)
    assert uses(x, 1, weight, bias) and uses(x, 1) and uses(x, 32, weight, bias)
    x, weight, bias = draw(3, 64, 128, 128)
    assert uses(x, 1, weight, bias)
    assert not uses(x, 4, weight, bias)  # threads do not idle, and a cache does not hold it
    assert not uses(x[:, :, ::2], 1, weight, bias)
    assert not uses(x.contiguous(memory_format=torch.channels_last), 1, weight, bias)
    assert not uses(x.double(), 1, weight.double(), bias.double())
    assert uses(x, 1, torch.randn(128)[::2], bias)
    assert not uses(x.view(3, 2**14, 64), 1)
    assert not uses(x.view(3, 2**20), 1)
    assert not uses(x[:, :1], 1)


def test_is_used_for_what_follows_too_where_that_is_faster():
    def uses(x, num_groups):
        y = group_norm(x.detach().requires_grad_(), num_groups, activation="relu")
        return type(y.grad_fn).__name__ == "_GroupNormBackward"

    x, _, _ = draw(1, 16, 128, 128)  # 1 MB
    assert uses(x, 1) and not uses(x, 16)  # in the caches, and no thread idles
    x, _, _ = draw(3, 64, 128, 128)
    assert uses(x, 4) and uses(x.bfloat16(), 4)
    assert not uses(x.contiguous(memory_format=torch.channels_last), 4) and not uses(x.double(), 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_from_pytorch(value):
    x, weight, bias = draw(1, 64, 128, 128)
    x[0, 3, 5, 7] = value
    torch.testing.assert_close(group_norm(x, 2, weight, bias), F.group_norm(x, 2, weight, bias), equal_nan=True)


@pytest.mark.parametrize("factor", [1.0, 1.2345, 3e-5, 70000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
def test_every_number_of_16_bits_is_read_and_rounded_as_by_pytorch(dtype, factor):
    """Subnormal numbers, infinities and NaN among them."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, -1)
    zero, weight = torch.zeros(1, 1), torch.tensor([factor])
    y = group_norm_cpu.apply(x, zero, zero + 1, weight, None, 1)
    assert y.dtype == dtype
    torch.testing.assert_close(y, (x.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_constant_input():
    x = torch.full((1, 64, 128, 128), 3.1)
    torch.testing.assert_close(group_norm(x, 1), torch.zeros_like(x), atol=1e-4, rtol=0)
    assert not group_norm(torch.zeros_like(x), 1).any()


def test_without_affine():
    x, weight, _ = draw(1, 64, 128, 128)
    torch.testing.assert_close(group_norm(x, 1), F.group_norm(x, 1))
    torch.testing.assert_close(group_norm(x, 1, weight), F.group_norm(x, 1, weight))


def test_gradient_that_is_an_expanded_number():
    x, weight, bias = draw(1, 64, 128, 128)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    ours, theirs = (torch.autograd.grad(f(x, 1, weight, bias).sum(), leaves) for f in (group_norm, F.group_norm))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_under_torch_compile_pytorchs_op_is_taken():
    """The compiler fuses that with what is around it."""
    x, weight, bias = draw(1, 64, 128, 128)
    targets = []

    def keep(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda *t: group_norm(t[0], 1, *t[1:]), backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), group_norm(x, 1, weight, bias))
    assert F.group_norm in targets


def test_modes_see_the_op():
    x, weight, bias = draw(1, 64, 128, 128)
    graph = make_fx(lambda *t: gradients(lambda *u: group_norm(u[0], 1, *u[1:]), *t))(x, weight, bias)
    other = draw(1, 64, 128, 128, mean=3)[0]
    for one, expected in zip(
        graph(other, weight, bias), gradients(lambda *t: group_norm(t[0], 1, *t[1:]), other, weight, bias)
    ):
        torch.testing.assert_close(one, expected, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        graph = make_fx(lambda *t: group_norm(t[0], 1, *t[1:]))(x, weight, bias)
    torch.testing.assert_close(graph(other, weight, bias), group_norm(other, 1, weight, bias))
    with FakeTensorMode() as mode, torch.no_grad():
        assert group_norm(mode.from_tensor(x), 1).shape == x.shape


def test_batched_gradients():
    x, weight, bias = draw(1, 64, 128, 128)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    dy = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        torch.autograd.grad(f(x, 1, weight, bias), leaves, dy, is_grads_batched=True)
        for f in (group_norm, F.group_norm)
    )
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_what_is_not_as_it_looks():
    """Negated or zero without memory, another default device, another layout from a hook on saved tensors."""
    x, weight, bias = draw(1, 64, 128, 128)
    y = group_norm(x, 1, weight, bias)
    with torch.no_grad():
        assert torch.equal(group_norm(x, 1, weight, bias), y)
        torch.testing.assert_close(group_norm(torch._neg_view(-x), 1, weight, bias), y)
    torch.testing.assert_close(group_norm(torch._neg_view(-x), 1, weight, bias), y)
    torch.testing.assert_close(group_norm(x, 1, torch._neg_view(-weight), bias), y)
    with torch.device("meta"):
        assert torch.equal(group_norm(x, 1, weight, bias), y)
        with torch.no_grad():
            assert torch.equal(group_norm(x, 1, weight, bias), y)
    x.requires_grad_()
    assert not torch.autograd.grad(group_norm(x, 1), x, torch._efficientzerotensor(x.shape))[0].any()
    expected = torch.autograd.grad(F.group_norm(x, 1).cos().sum(), x)[0]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ):
        torch.testing.assert_close(torch.autograd.grad(group_norm(x, 1).cos().sum(), x)[0], expected)


def test_the_op_refuses_what_it_would_misread():
    x, weight, bias = draw(2, 6, 9, 7)
    statistics, apply, backward = (
        getattr(torch.ops.gng_d2, f"group_norm_{name}").default for name in ("statistics", "apply", "backward")
    )
    other_layout = x.contiguous(memory_format=torch.channels_last)
    mean, rstd = statistics(other_layout, 3, 1e-5)
    for layout in (x, other_layout):
        y = apply(layout, mean, rstd, weight, bias, 3)
        torch.testing.assert_close(y, F.group_norm(x, 3, weight, bias))
    for wrong, call in {
        "float64": lambda: statistics(x.double(), 3, 1e-5),
        "the input has shape .* torch.float64": lambda: apply(x.double(), mean, rstd, weight, bias, 3),
        "mean has shape .* torch.float16": lambda: apply(x, mean.half(), rstd, weight, bias, 3),
        "residual has shape .* torch.float16": lambda: apply(x, mean, rstd, weight, bias, 3, None, x.half()),
        "dy has shape .* torch.float32": lambda: backward(y, x.half(), mean, rstd, weight, 3),
    }.items():
        with pytest.raises(RuntimeError, match=wrong):
            call()
    x, weight, bias = draw(1, 64, 128, 128)
    mean, rstd = statistics(x, 1, 1e-5)
    weight.untyped_storage().resize_(0)
    for call in (lambda: apply(x, mean, rstd, weight, bias, 1), lambda: group_norm(x, 1, weight, bias)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="have memory"):
            call()
    with torch.no_grad():
        assert not group_norm(torch._efficientzerotensor((1, 64, 128, 128)), 1).any()


def test_a_traced_graph_has_gradients():
    x, weight, bias = draw(1, 64, 128, 128)
    graph = make_fx(lambda *t: group_norm(t[0], 1, *t[1:]))(x, weight, bias)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = gradients(lambda *t: group_norm(t[0], 1, *t[1:]), x, weight, bias)
    for one, other in zip(gradients(graph, *leaves), expected):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
