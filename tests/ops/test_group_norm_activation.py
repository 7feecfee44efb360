"""group_norm with an activation and a residual, against the unfused modules in float64."""

import importlib
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from needs import COMPILE, KERNELS
from recorder import Recorder
from torch.nn import functional as F

from gng_d2.errors import InputError
from gng_d2.ops import cpu_kernels, group_norm, group_norm_cpu

op_module = importlib.import_module("gng_d2.ops.group_norm")  # `gng_d2.ops.group_norm` is the function
pytestmark = [pytest.mark.gpu, KERNELS]
ACTIVATIONS = {None: lambda t: t, "relu": F.relu, "silu": F.silu}
FUSED = [pair for pair in itertools.product(ACTIVATIONS, (False, True)) if pair != (None, False)]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def unfused(x, num_groups, weight=None, bias=None, eps=1e-5, activation=None, residual=None):
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


@pytest.fixture(params=["cpu", "triton"])
def road(request, monkeypatch, register):
    """The backend that takes every input, and a device for it."""
    is_triton = request.param == "triton"
    if not is_triton and not cpu_kernels.is_compiled():
        pytest.skip("gng_d2 was installed without a C compiler")
    backend = pytest.importorskip("gng_d2.ops.group_norm_triton") if is_triton else group_norm_cpu
    monkeypatch.setattr(op_module, "_backend", lambda *args: backend)
    if is_triton and torch.cuda.is_available():
        return backend, "cuda"
    register(backend)
    return backend, "cpu"


def draw(rng, device, dtype, shape=None, residual=True):
    """Input, groups, affine, residual, and an output gradient that is 0 where relu's slope depends on rounding."""
    shape = shape or rng.choice([(2, 6, 5, 7), (1, 4, 33), (3, 6), (1, 6, 2, 3, 2), (2, 12, 9, 8), (1, 2, 40, 130)])
    layout = rng.choice([torch.contiguous_format, CHANNELS_LAST.get(len(shape), torch.contiguous_format)])
    x, r, dy = (torch.randn(shape).to(device, dtype, memory_format=layout) for _ in range(3))
    parameters = rng.choice([dtype, torch.float32]) if dtype != torch.float64 else dtype
    weight, bias = (torch.randn(shape[1]).to(device, parameters) if rng.random() < 0.8 else None for _ in range(2))
    num_groups = rng.choice([g for g in range(1, shape[1] + 1) if shape[1] % g == 0 and shape[1] * len(shape) > 2 * g])
    x = x * rng.choice([0.5, 3]) + rng.choice([0, 1])
    r = r if residual else None
    wide = [None if t is None else t.double() for t in (x, weight, bias, r)]
    t = unfused(wide[0], num_groups, *wide[1:3], residual=wide[3])
    dy = torch.where(t.abs() < 50 * torch.finfo(dtype).eps, 0, dy)
    return x, num_groups, weight, bias, r, dy


def gradients(function, x, num_groups, weight, bias, residual, dy, activation):
    """The output, and the gradients of all that is given."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    y = function(leaves[0], num_groups, *leaves[1:3], 1e-5, activation, leaves[3])
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def in_float64(tensors):
    return [t.double() if torch.is_tensor(t) else t for t in tensors]


# relative, of the norm of the output or gradient. The interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}


def assert_close(ours, exact, dtype, factor=1):
    for one, other in zip(ours, exact, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= factor * TOLERANCE[dtype] * other.norm() + 1e-30


@pytest.mark.parametrize("activation, has_residual", FUSED)
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_are_those_of_the_unfused_ops(road, activation, has_residual, seed):
    backend, device = road
    for dtype in backend.DTYPES:
        drawn = draw(random.Random(seed), device, dtype, residual=has_residual)
        ours = gradients(group_norm, *drawn, activation)
        assert ours[0].dtype == ours[1].dtype == dtype and ours[0].stride() == drawn[0].stride()
        assert_close(ours, gradients(unfused, *in_float64(drawn), activation), dtype)


@pytest.mark.parametrize("activation, has_residual", FUSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(1, 64, 60, 61), (2, 6, 5, 7), (4, 3, 9)])
def test_whoever_computes_it(activation, has_residual, dtype, shape):
    """Kernels, the norm's kernel and PyTorch's ops, or PyTorch's ops alone, whose sums are less accurate."""
    drawn = draw(random.Random(0), "cpu", dtype, shape, has_residual)
    exact = gradients(unfused, *in_float64(drawn), activation)
    assert_close(gradients(group_norm, *drawn, activation), exact, dtype, factor=3)


@pytest.mark.slow
@pytest.mark.parametrize("activation, has_residual", FUSED)
def test_large_inputs(road, activation, has_residual):
    """Of several pieces a row, and several chunks."""
    drawn = draw(random.Random(0), road[1], torch.float32, (2, 4, 130, 131), has_residual)
    exact = gradients(unfused, *in_float64(drawn), activation)
    assert_close(gradients(group_norm, *drawn, activation), exact, torch.float32)


def reference_backend():
    """One in float64, of PyTorch's ops."""

    def statistics(x, num_groups, eps):
        variance, mean = torch.var_mean(x.view(len(x), num_groups, -1), 2, correction=0)
        return mean.float(), (variance + eps).rsqrt().float()

    def apply(x, mean, rstd, weight, bias, num_groups, activation, residual):
        return unfused(x, num_groups, weight, bias, 1e-5, activation, residual)

    def backward(dy, x, mean, rstd, weight, num_groups, activation, bias, kept):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            parameters = [
                torch.ones(x.shape[1]).to(x) if weight is None else weight.detach(),
                torch.zeros_like(x[0, :, 0]),
            ]
            parameters = [p.detach().requires_grad_() for p in parameters]
            y = F.group_norm(leaf, num_groups, *parameters)
            t = y.detach() if bias is None else y.detach() + bias.view(1, -1, 1)
            t = kept if activation == "relu" and kept is not None else t if kept is None else t + kept
            slope = {None: 1.0, "relu": (t > 0).to(t), "silu": t.sigmoid() * (1 + t * (1 - t.sigmoid()))}[activation]
            gradients = torch.autograd.grad(y, (leaf, *parameters), dy * slope)
        return *gradients, None if kept is None else dy * slope

    functions = {"statistics": statistics, "apply": apply, "backward": backward}
    return SimpleNamespace(DTYPES=(torch.float64,), READS_CHANNELS_LAST=False, **functions)


@pytest.mark.parametrize("activation, has_residual", [(None, False), *FUSED])
@pytest.mark.parametrize("affine", [False, True])
def test_first_and_second_derivatives(activation, has_residual, affine, monkeypatch, register):
    backend = reference_backend()
    monkeypatch.setattr(op_module, "_backend", lambda *args: backend)
    register(backend)
    tensors = [torch.randn(2, 4, 5), *torch.randn(2, 4), torch.randn(2, 4, 5)]
    given = [True, affine, affine, has_residual]
    leaves = [t.double().requires_grad_() for t, is_given in zip(tensors, given) if is_given]

    def function(*leaves):
        arguments = iter(leaves)
        x, weight, bias, residual = (next(arguments) if is_given else None for is_given in given)
        return group_norm(x, 2, weight, bias, 1e-5, activation, residual)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("activation, has_residual", FUSED)
def test_forward_mode(activation, has_residual):
    x, residual = torch.randn(2, 2, 4, 5).double().requires_grad_()
    leaves = (x, residual) if has_residual else (x,)
    function = lambda x, r=None: group_norm(x, 2, activation=activation, residual=r)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_some_inputs_take_a_gradient(road, activation, wanted):
    x, num_groups, _, _, residual, dy = draw(random.Random(1), road[1], torch.float32, (2, 6, 5, 7))
    tensors = [x, torch.randn_like(x[0, :, 0, 0]), torch.randn_like(x[0, :, 0, 0]), residual]
    for create_graph in (False, True):
        results = []
        for function in (group_norm, unfused):
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
            y = function(leaves[0], num_groups, *leaves[1:3], 1e-5, activation, leaves[3])
            inputs = [leaves[i] for i in wanted]
            results.append(torch.autograd.grad((y * dy).sum(), inputs, create_graph=create_graph))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batched_gradients(road, activation):
    x, num_groups, weight, bias, residual, dy = draw(random.Random(1), road[1], torch.float32)
    leaves = [t.requires_grad_() for t in (x, residual)]
    ours, theirs = (
        torch.autograd.grad(
            f(x, num_groups, weight, bias, 1e-5, activation, residual),
            leaves,
            torch.stack([dy, -dy]),
            is_grads_batched=True,
        )
        for f in (group_norm, unfused)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_residual_of_a_relu_may_change_before_the_backward_pass(road):
    """Its output is kept instead, which the next layer keeps as well."""
    x, num_groups, weight, bias, residual, dy = draw(random.Random(1), road[1], torch.float32)
    x.requires_grad_()
    y = group_norm(x, num_groups, weight, bias, activation="relu", residual=residual)
    expected = torch.autograd.grad(unfused(x, num_groups, weight, bias, 1e-5, "relu", residual), x, dy)
    residual.add_(1)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), expected)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations_of_any_number(road, activation):
    """Here the norm is 0, and the residual alone is activated: large, small and what is not finite."""
    inf, nan = float("inf"), float("nan")
    numbers = torch.cat(
        [torch.linspace(-120, 120, 1009), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, inf, -inf, nan])]
    )
    residual = numbers.view(1, 1, -1).to(road[1]).requires_grad_()
    zero = torch.zeros(1, device=road[1])
    y = group_norm(torch.zeros_like(residual), 1, zero, zero, 1e-5, activation, residual)
    expected = ACTIVATIONS[activation](residual.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-35, equal_nan=True)
    ours, exact = (torch.autograd.grad(t.sum(), residual)[0] for t in (y, expected))
    finite = residual.isfinite() & (residual.abs() < 1e29)  # of silu PyTorch's slope is NaN at infinity
    torch.testing.assert_close(ours[finite], exact[finite], rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not cpu_kernels.is_compiled(), reason="gng_d2 was installed without a C compiler")
def test_who_computes_it(threads):
    x = torch.randn(1, 64, 256, 256)
    assert op_module._backend(x, 32, None, None, 1e-5) is None
    assert op_module._backend(x, 32, None, None, 1e-5, "relu") is group_norm_cpu
    assert op_module._backend(x, 32, None, None, 1e-5, None, x) is group_norm_cpu
    for residual in (x[:, :1], x.double(), torch.tensor(1.0), x.to_sparse(), x.to("meta")):
        assert op_module._backend(x, 1, None, None, 1e-5, "relu", residual) is None
    assert op_module._backend(x, 1, None, None, 1e-5, "gelu") is None
    assert op_module._backend(x.contiguous(memory_format=torch.channels_last), 1, None, None, 1e-5, "relu") is None
    residual = x[:, :1]
    with Recorder() as recorder:  # the norm's kernel, then PyTorch's ops
        y = group_norm(x, 1, activation="relu", residual=residual)
    ours = ["gng_d2.group_norm_statistics.default", "gng_d2.group_norm_apply.default"]
    assert recorder.ops == [*ours, "aten.add.Tensor", "aten.relu.default"]
    torch.testing.assert_close(y, F.relu(F.group_norm(x, 1) + residual))


@pytest.mark.filterwarnings("ignore")
@COMPILE
@pytest.mark.parametrize("activation, has_residual", FUSED)
def test_what_compiles_traces_and_transforms_takes_pytorchs_ops(activation, has_residual):
    x = torch.randn(1, 16, 128, 128)
    residual = torch.randn_like(x) if has_residual else None
    expected = unfused(x, 1, activation=activation, residual=residual)

    class Block(torch.nn.Module):
        def forward(self, x):
            return group_norm(x, 1, activation=activation, residual=residual)

    function, graphs = Block(), []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    outputs = [
        torch.compile(function, backend=keep, fullgraph=True)(x),
        torch.func.vmap(function)(x[None])[0],
        torch.func.functional_call(function, {}, x),
        torch.jit.script(group_norm)(x, 1, None, None, 1e-5, activation, residual),
        torch.fx.symbolic_trace(function)(x),
    ]
    traced = torch.jit.trace(function, x, check_trace=False)
    exported = torch.export.export(function, (x,))
    graphs += [str(traced.graph), str(exported.graph)]
    for output in (*outputs, traced(x), exported.module()(x)):
        torch.testing.assert_close(output, expected)
    assert not any("gng_d2::" in graph or "ops.gng_d2" in graph for graph in graphs)
    gradient = torch.func.grad(lambda x: function(x).cos().sum())(x)
    wanted = torch.func.grad(lambda x: unfused(x, 1, None, None, 1e-5, activation, residual).cos().sum())(x)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.filterwarnings("ignore")
def test_other_activations_are_refused():
    for shape in ((1, 4, 3), (1, 64, 128, 128)):
        for activation in ("gelu", "ReLU", "", F.relu, True):
            with pytest.raises(InputError, match="set it to 'relu', 'silu' or None"):
                group_norm(torch.randn(shape), 1, activation=activation)
    with pytest.raises(Exception, match="activation is gelu: set it to 'relu', 'silu' or None"):
        torch.jit.script(group_norm)(torch.randn(1, 4, 3), 1, activation="gelu")
