"""The op of a norm over groups of several sizes, by the kernels for the CPU and in PyTorch's ops."""

import math

import pytest
import torch
from needs import KERNELS
from recorder import Recorder
from torch.nn import functional as F

from gng_d2.errors import InputError
from gng_d2.ops import cpu_kernels, group_sizes, learned_group_norm, set_kernels_enabled
from gng_d2.ops.learned_group_norm import _in_plain_ops


def leaves_of(*shape, dtype=torch.float32, mean=0.0, std=1.0):
    rng = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=rng, dtype=torch.float64)

    channels = shape[1]
    x = mean + std * (draw(*shape) + 2 * draw(channels, *[1] * (len(shape) - 2)))
    mixtures = draw(2, len(group_sizes(channels))).softmax(1)
    return [t.to(dtype).requires_grad_() for t in (x, mixtures, draw(channels), draw(channels))]


def gradients(function, leaves):
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def brute_force(x, mixtures, weight=None, bias=None, eps=1e-5):
    """Each channel of each image from lists of its groups' numbers."""
    channels, rows = x.shape[1], []
    for image in x:
        for c in range(channels):
            groups = [image[c // size * size :][:size] for size in group_sizes(channels)]
            mean = sum(a * group.mean() for a, group in zip(mixtures[0], groups))
            variance = sum(b * group.var(correction=0) for b, group in zip(mixtures[1], groups))
            row = (image[c] - mean) / (variance + eps).sqrt()
            row = row if weight is None else row * weight[c]
            rows.append(row if bias is None else row + bias[c])
    return torch.stack(rows).view_as(x)


@pytest.fixture(params=[pytest.param("kernels", marks=KERNELS), "PyTorch's ops"])
def op(request):
    with set_kernels_enabled("cpu" if request.param == "kernels" else "off"):
        yield learned_group_norm


def relative_errors(ours, exact):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact)]


@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 4), (1, 12, 3, 3, 2), (3, 8, 7), (2, 1, 3, 3), (1, 7, 67, 63), (2, 24, 1, 1), (3, 12)]
)
def test_values_and_gradients_are_those_of_brute_force(op, shape):
    exact = gradients(brute_force, leaves_of(*shape, dtype=torch.float64))
    errors = relative_errors(gradients(op, leaves_of(*shape)), exact)
    assert max(errors) < 1e-5 and errors[0] < 1e-6


def test_sizes():
    assert [group_sizes(c) for c in (1, 2, 7, 12, 64)] == [[1], [1, 2], [1, 7], [1, 2, 4, 12], [1, 2, 4, 8, 16, 32, 64]]


@pytest.mark.parametrize("size", group_sizes(24))
def test_one_size_alone_is_group_norm(op, size):
    x, _, weight, bias = leaves_of(2, 24, 9, 9)
    only = torch.tensor([[float(size == k) for k in group_sizes(24)]] * 2)
    ours = gradients(lambda *leaves: op(leaves[0], only, *leaves[1:]), [x, weight, bias])
    theirs = gradients(lambda x, weight, bias: F.group_norm(x, 24 // size, weight, bias), [x, weight, bias])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)])
def test_half_of_the_affine(op, given):
    leaves = {name: t if name in given else None for name, t in zip(("weight", "bias"), leaves_of(2, 6, 5, 5)[2:])}

    def of(dtype, function):
        x, mixtures = leaves_of(2, 6, 5, 5, dtype=dtype)[:2]
        rest = [t if t is None else t.detach().to(dtype).requires_grad_() for t in leaves.values()]
        return gradients(function, [x, mixtures, *rest])

    assert max(relative_errors(of(torch.float32, op), of(torch.float64, brute_force))) < 1e-5


@pytest.mark.parametrize("mean, std", [(1000, 1), (0, 1e-3), (-3e4, 10)])
def test_large_means_and_small_variances(op, mean, std):
    """The error is that of group norm, whose input is rounded as well."""
    x, mixtures, weight, bias = leaves_of(2, 32, 20, 20, mean=mean, std=std)
    wide = [t.detach().double() for t in (x, mixtures, weight, bias)]
    (error,) = relative_errors([op(x, mixtures, weight, bias)], [_in_plain_ops(*wide, 1e-5)])
    (theirs,) = relative_errors([F.group_norm(x, 8, weight, bias)], [F.group_norm(wide[0], 8, *wide[2:])])
    assert error < 2 * theirs + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["as the input", "float32"])
def test_half_precision(op, dtype, parameters):
    leaves = leaves_of(2, 16, 9, 9)
    exact = gradients(_plain, [t.detach().to(dtype).double().requires_grad_() for t in leaves])
    kinds = [dtype, *[dtype if parameters == "as the input" else torch.float32] * 3]
    ours = gradients(op, [t.detach().to(dtype).to(kind).requires_grad_() for t, kind in zip(leaves, kinds)])
    assert [t.dtype for t in ours] == [dtype, *kinds]
    assert max(relative_errors(ours, exact)) < 3 * torch.finfo(dtype).eps


def _plain(x, mixtures, weight, bias):
    return _in_plain_ops(x, mixtures, weight, bias, 1e-5)


def test_derivatives_of_second_order(op):
    leaves = leaves_of(2, 6, 3, 3)

    def second(function, leaves):
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)

    exact = second(brute_force, [t.detach().double().requires_grad_() for t in leaves])
    assert max(relative_errors(second(op, leaves), exact)) < 1e-4


def test_batched_gradients(op):
    leaves = leaves_of(2, 6, 5, 5)
    y = op(*leaves)
    many = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(2))
    batched = torch.autograd.grad(y, leaves, many, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in many]
    for a, b in zip(batched, map(torch.stack, zip(*single))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, "expanded", "every second"])
def test_any_layout_of_the_input_and_the_gradient(op, layout):
    x, mixtures, weight, bias = (t.detach() for t in leaves_of(2, 6, 4, 4))
    expected = gradients(_plain, [t.clone().requires_grad_() for t in (x, mixtures, weight, bias)])
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    if layout == "every second":
        x = x.repeat_interleave(2, 3)[..., ::2]
    elif layout == "expanded":
        dy = dy.sum().expand(dy.shape)
    else:
        x, dy = x.to(memory_format=layout), dy.to(memory_format=layout)
    leaves = [t.requires_grad_() for t in (x, mixtures, weight, bias)]
    y = op(*leaves)
    torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(_plain(*leaves), leaves, dy)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_parameters_that_are_views(op):
    x, mixtures, *_ = leaves_of(2, 6, 4, 4)
    affine = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    wide = torch.cat([mixtures.detach(), mixtures.detach()], 1)[:, : mixtures.shape[1]]
    expected = op(x, mixtures, affine[:, 0].contiguous(), affine[:, 1].contiguous())
    torch.testing.assert_close(op(x, wide, affine[:, 0], affine[:, 1]), expected)
    torch.testing.assert_close(op(x, mixtures, torch.tensor(2.0).expand(6)), 2 * op(x, mixtures))


@pytest.mark.parametrize("shape", [(2, 3), (4,), (1, 4), (2, 5)])
def test_mixtures_of_another_shape_are_refused(op, shape):
    message = rf"mixtures has shape \[{', '.join(map(str, shape))}\]; 12 channels need \(2, 4\)"
    with pytest.raises(InputError, match=message):
        op(torch.randn(2, 12, 4, 4), torch.ones(shape))


def test_an_affine_of_another_shape_is_refused(op):
    x, mixtures, *_ = leaves_of(2, 6, 4, 4)
    for wrong in ({"weight": torch.ones(3)}, {"bias": torch.ones(7)}):
        with pytest.raises(RuntimeError, match="must match"):
            op(x, mixtures, **wrong)


def test_the_bias_may_change_before_the_backward_pass(op):
    x, mixtures, weight, bias = leaves_of(2, 6, 4, 4)
    changed = bias.detach().clone()
    y = op(x, mixtures, weight, changed)
    changed += 1
    expected = torch.autograd.grad(op(x, mixtures, weight, bias).sin().sum(), [x, weight])
    for a, b in zip(torch.autograd.grad(y.sin().sum(), [x, weight]), expected):
        torch.testing.assert_close(a, b)


def test_more_channels_than_the_kernels_take():
    x, *parameters = leaves_of(1, 2**13 + 2, 2, 2)
    torch.testing.assert_close(learned_group_norm(x, *parameters), _plain(x, *parameters))


def test_no_image(op):
    x, *parameters = leaves_of(2, 6, 4, 4)
    none = x.detach()[:0].requires_grad_()
    y = op(none, *parameters)
    assert y.shape == (0, 6, 4, 4)
    assert all(g.eq(0).all() for g in torch.autograd.grad(y.sum(), parameters))


def test_no_result_depends_on_the_number_of_threads(threads):
    results = []
    for number in (1, 4):
        torch.set_num_threads(number)
        results.append(gradients(learned_group_norm, leaves_of(3, 24, 67, 63)))
    assert all(map(torch.equal, *results))


def test_nan_stays_in_its_image(op):
    x, *parameters = (t.detach() for t in leaves_of(2, 6, 4, 4))
    x[0, 1, 2, 3] = math.nan
    y = op(x, *parameters)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.skipif(not cpu_kernels.is_compiled(), reason="gng_d2 was installed without a C compiler")
@KERNELS
def test_the_kernels_compute_it(monkeypatch):
    called, call = [], cpu_kernels.call
    monkeypatch.setattr(cpu_kernels, "call", lambda name, *args: (called.append(name), call(name, *args)))
    leaves = leaves_of(2, 6, 4, 4)
    gradients(learned_group_norm, leaves)
    backward = ["row_sums", "mix_moments_backward", "row_gradients"]
    assert called == ["group_norm_statistics", "mix_moments", "group_norm_apply", *backward]
    called.clear()
    for kind in (torch.float64, torch.bfloat16):  # no kernels for the first; the second's parameters have another type
        learned_group_norm(leaves[0].to(kind), *[t.double() for t in leaves[1:]])
    with set_kernels_enabled("off"):
        learned_group_norm(*leaves)
    assert called == []
    with Recorder() as recorder:  # what watches ops sees those that read and write the data
        learned_group_norm(*leaves)
    assert {"gng_d2.group_norm_statistics.default", "gng_d2.group_norm_apply.default"} <= set(recorder.ops)


@KERNELS
def test_compiled_traced_and_scripted():
    x, *parameters = (t.detach() for t in leaves_of(2, 6, 4, 4))
    expected = learned_group_norm(x, *parameters)
    functions = [
        torch.compile(learned_group_norm, backend="aot_eager", fullgraph=True),
        torch.jit.trace(learned_group_norm, (x, *parameters)),
        torch.jit.script(learned_group_norm),
        torch.func.vmap(lambda image, *rest: learned_group_norm(image[None], *rest)[0], (0, None, None, None)),
    ]
    for function in functions:
        torch.testing.assert_close(function(x, *parameters), expected, rtol=1e-4, atol=1e-5)
