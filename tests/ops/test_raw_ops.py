"""The registered ops, called by themselves with whatever comes: right results, or RuntimeError."""

import importlib
import random
from functools import partial

import pytest
import torch
from needs import KERNELS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from gng_d2.ops import cpu_kernels, group_norm_cpu, weight_standardization, weight_standardization_cpu
from gng_d2.ops.backends import HAS_OPS

pytestmark = KERNELS

group_norm_op = importlib.import_module("gng_d2.ops.group_norm")  # `gng_d2.ops.group_norm` is the function
ops = torch.ops.gng_d2
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(params=["cpu", "triton"])
def backend(request, register):
    """The CPU tensors go to these kernels, for Triton's in its interpreter; the backend's types."""
    if request.param == "cpu":
        if not cpu_kernels.is_compiled():
            pytest.skip("gng_d2 was installed without a C compiler")
        norm, weight = group_norm_cpu, weight_standardization_cpu
    else:
        if torch.cuda.is_available():
            pytest.skip("there is no interpreter where there is a GPU")
        norm = pytest.importorskip("gng_d2.ops.group_norm_triton")
        weight = importlib.import_module("gng_d2.ops.weight_standardization_triton")
    library = register(norm)
    library.impl("standardize", "CPU", partial(weight_standardization._forward, weight))
    library.impl("standardize_backward", "CPU", partial(weight_standardization._backward, weight))
    return norm


def layouts_of(t):
    """``t`` in every layout that it can have."""
    yield t
    if t.dim() in CHANNELS_LAST:
        yield t.contiguous(memory_format=CHANNELS_LAST[t.dim()])
    if t.dim() > 1:
        yield t.transpose(0, 1).contiguous().transpose(0, 1)
        yield t.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.stack([t, t + 1], -1)[..., 0]
    yield torch.cat([t, t])[: len(t)]
    yield torch._neg_view(-t)


def wrong_ones_of(t):
    """``t`` in other types, shapes and places."""
    yield t.double()
    yield t.to(torch.complex64)
    yield t.long()
    yield t.to("meta")
    yield t[:0]
    yield t[:-1]
    yield torch.cat([t, t])
    yield t.flatten()[0]
    yield t[None]
    yield t[..., None]
    if t.dim() > 1:
        yield t.flatten()
        yield t[:, :-1]
        yield t[..., :-1]
    freed = t.clone()
    freed.untyped_storage().resize_(0)
    yield freed
    yield t.to_sparse()
    yield None
    yield 3


def statistics_reference(x, num_groups, eps):
    return torch.native_group_norm(x.contiguous(), None, None, *x.shape[:2], x[0, 0].numel(), num_groups, eps)[1:]


def apply_reference(x, mean, rstd, weight, bias, num_groups, activation=None, residual=None):
    by_channel = [1, x.shape[1]] + [1] * (x.dim() - 2)
    z = (x.reshape(len(x), num_groups, -1) - mean[..., None]) * rstd[..., None]
    y = z.view(x.shape) * (1 if weight is None else weight.view(by_channel))
    return group_norm_op._activate(y + (0 if bias is None else bias.view(by_channel)), activation, residual)


def backward_reference(dy, x, mean, rstd, weight, num_groups, activation=None, bias=None, kept=None):
    images, channels = x.shape[:2]
    dy, x, mean, rstd = (t.contiguous() for t in (dy, x, mean, rstd))  # PyTorch 2.4 misreads them in other layouts
    if activation == "silu":
        t = apply_reference(x, mean, rstd, weight, bias, num_groups, None, kept)
        dy = torch.ops.aten.silu_backward(dy, t)
    gradients = torch.ops.aten.native_group_norm_backward(
        dy, x, mean, rstd, weight, images, channels, x[0, 0].numel(), num_groups, [True] * 3
    )
    return *gradients, x.new_empty(0) if kept is None else dy


def standardize_reference(weight, eps):
    return weight_standardization._standardize(weight, eps)


def standardize_backward_reference(gradient, weight, eps):
    leaf = weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(weight_standardization._standardize(leaf, eps), leaf, gradient)[0]


def calls(shape=(2, 6, 3, 2), groups=3):
    """Each op, its reference and arguments."""
    dy, x, residual = torch.randn(3, *shape)
    weight, bias = torch.randn(2, shape[1])
    moments = statistics_reference(x, groups, 1e-5)
    apply = ops.group_norm_apply.default, apply_reference
    backward = ops.group_norm_backward.default, backward_reference
    return {
        "statistics": (ops.group_norm_statistics.default, statistics_reference, [x, groups, 1e-5]),
        "apply": (*apply, [x, *moments, weight, bias, groups]),
        "silu": (*apply, [x, *moments, weight, bias, groups, "silu", residual]),
        "backward": (*backward, [dy, x, *moments, weight, groups]),
        "silu_backward": (*backward, [dy, x, *moments, weight, groups, "silu", bias, residual]),
        "standardize": (ops.standardize.default, standardize_reference, [x, 1e-5]),
        "standardize_backward": (ops.standardize_backward.default, standardize_backward_reference, [dy, x, 1e-5]),
    }


CALLS = calls() if HAS_OPS else {}
TENSORS = [(call, i) for call, (_, _, args) in CALLS.items() for i, value in enumerate(args) if torch.is_tensor(value)]


TAKE_ANY_SHAPE = ("statistics", 0), ("apply", 0), ("standardize", 0)


@pytest.mark.slow
@pytest.mark.parametrize("call, tensor", TENSORS)
@pytest.mark.parametrize("shape", [(2, 6, 3, 2), (3, 6), (1, 6, 2, 1, 2)])
def test_every_layout_is_read_right_and_fake_tensors_agree(backend, call, tensor, shape):
    op, reference, args = calls(shape)[call]
    expected = reference(*args)
    for layout in layouts_of(args[tensor]):
        args[tensor] = layout
        real = op(*args)
        torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-4)
        if not layout.is_neg():  # FakeTensor has none
            assert meta_of(faked(op, args)) == meta_of(real)


def meta_of(tensors):
    return [(t.shape, t.stride(), str(t.dtype)) for t in ((tensors,) if torch.is_tensor(tensors) else tensors)]


@pytest.mark.parametrize("call, tensor", TENSORS)
def test_every_wrong_tensor_is_refused(backend, call, tensor):
    op, _, args = calls()[call]
    right = args[tensor]
    for wrong in wrong_ones_of(right):
        args[tensor] = wrong
        if wrong is None and op._schema.arguments[tensor].type.kind() == "OptionalType":
            op(*args)
        elif (call, tensor) in TAKE_ANY_SHAPE and torch.is_tensor(wrong) and wrong.dim() and wrong.numel():
            outcome(op, args)  # an input of more images, or a weight of another shape, is right
        else:
            with pytest.raises(RuntimeError):
                op(*args)


def outcome(op, args):
    """What ``op`` returns, None if it refuses. Nothing but RuntimeError, which pytest tells from a crash."""
    try:
        return op(*args)
    except RuntimeError:
        return None


@pytest.mark.parametrize("groups", [0, -1, -3, 4, 5, 7, 12, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_groups_that_do_not_divide_are_refused(backend, groups):
    for call in ("statistics", "apply", "silu", "backward", "silu_backward"):
        op, _, args = calls()[call]
        args[1 if call == "statistics" else 5] = groups
        with pytest.raises(RuntimeError, match="does not divide"):
            op(*args)


def test_other_activations_are_refused(backend):
    for op, _, args in (calls()[call] for call in ("silu", "silu_backward")):
        args[args.index("silu")] = "gelu"
        for run in (op, faked):
            with pytest.raises(RuntimeError, match="'gelu' is none of the activations"):
                run(*args) if run is op else run(op, args)


def test_filters_without_a_deviation_are_refused(backend):
    for shape in ((), (4,), (4, 1), (4, 1, 1, 1), (0, 3), (3, 0), (0,)):
        with pytest.raises(RuntimeError, match="no filters of two"):
            ops.standardize(torch.ones(shape), 1e-5)
        with pytest.raises(RuntimeError, match="no filters of two"):
            ops.standardize_backward(torch.ones(shape), torch.ones(shape), 1e-5)


def drawn(rng, shapes, dtypes):
    """A tensor of one of these shapes, in some type and layout, or none."""
    shape = rng.choice(shapes)
    t = torch.randn(shape).to(rng.choice(dtypes))
    if rng.random() < 0.1:
        t = t.to("meta")
    elif t.dim() and len(t) and rng.random() < 0.5:
        t = rng.choice(list(layouts_of(t)))
    return t if rng.random() < 0.95 else None


@pytest.mark.parametrize("seed", range(2))
def test_random_arguments(backend, seed):
    """Mostly almost right, so that many reach a kernel."""
    rng, reached = random.Random(seed), 0
    for _ in range(100 if backend is group_norm_cpu else 40):
        shape = rng.choice(
            [(2, 6, 5, 7), (1, 4, 3), (3, 6), (2, 6, 2, 3, 2), (1, 1, 1, 1), (0, 6, 4), (2, 0, 4), (6,), ()]
        )
        dtypes = [torch.float32] * 12 + [torch.float16, torch.float64, torch.int32]
        channels = [shape[1:2]] * 8 + [(5,), (), (6, 1)]
        num_groups = rng.choice([1, 2, 3, 6, 0, -1])
        x, dy = (drawn(rng, [shape] * 8 + [(*shape, 1), shape[:-1]], dtypes) for _ in range(2))
        weight, bias = (drawn(rng, channels, dtypes) for _ in range(2))
        activation, kept = rng.choice([(None, None), ("silu", None), ("silu", x), ("silu", dy)])
        moments = [(*shape[:1], max(num_groups, 0))] * 8 + [(2, 2), (1,)]
        mean, rstd = (drawn(rng, moments, dtypes) for _ in range(2))
        for op, reference, args in (
            (ops.group_norm_statistics.default, statistics_reference, (x, num_groups, 1e-5)),
            (
                ops.group_norm_apply.default,
                apply_reference,
                (x, mean, rstd, weight, bias, num_groups, activation, kept),
            ),
            (
                ops.group_norm_backward.default,
                backward_reference,
                (dy, x, mean, rstd, weight, num_groups, activation, bias, kept),
            ),
            (ops.standardize.default, standardize_reference, (x, 1e-5)),
            (ops.standardize_backward.default, standardize_backward_reference, (dy, x, 1e-5)),
        ):
            result = outcome(op, args)
            tensors = [t for t in args if torch.is_tensor(t)]
            if (
                result is not None
                and not any(t.is_meta for t in tensors)
                and all(t.dtype == torch.float32 for t in tensors)
            ):
                torch.testing.assert_close(result, reference(*args), rtol=1e-3, atol=1e-3)
                reached += 1
    assert reached > 10


def faked(op, args):
    with FakeTensorMode() as mode:
        return op(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in args))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
def test_the_ops_keep_pytorchs_rules_channels_last(backend, call):
    op, _, args = calls((1, 4, 2, 3), 2)[call]
    args = [a.contiguous(memory_format=torch.channels_last) if torch.is_tensor(a) and a.dim() == 4 else a for a in args]
    torch.library.opcheck(op, tuple(args), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("call, tensor", TENSORS)
def test_fake_tensors_are_refused_where_real_ones_are(backend, call, tensor):
    op, _, args = calls()[call]
    args[tensor] = args[tensor][:1, :1, :1, :1] if (call, tensor) in TAKE_ANY_SHAPE else args[tensor][:-1]
    with pytest.raises(RuntimeError):
        faked(op, args)


@pytest.mark.slow
def test_a_graph_runs_on_another_layout_than_it_was_traced_with(backend):
    x = torch.randn(2, 6, 5, 7)
    graph = make_fx(lambda x: 2 * group_norm_op._forward(x, None, None, 3, 1e-5, None, None)[0])(x)
    compiled = torch.compile(graph, backend="aot_eager")
    for layout in layouts_of(x):
        torch.testing.assert_close(compiled(layout), 2 * F.group_norm(x, 3))
