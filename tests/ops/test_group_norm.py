"""The op around the kernels: which it picks, and what PyTorch does with it. Numbers: test_group_norm_{cpu,triton}.py"""

import importlib

import pytest
import torch
from needs import KERNELS, needs_torch
from recorder import Recorder
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from gng_d2.ops import backends, cpu_kernels, group_norm, group_norm_cpu

triton_kernels = pytest.importorskip("gng_d2.ops.group_norm_triton")
op_module = importlib.import_module("gng_d2.ops.group_norm")  # `gng_d2.ops.group_norm` is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu, KERNELS]


@pytest.fixture
def kernels(monkeypatch, register):
    """Every input goes to the Triton kernels, on a CPU in Triton's interpreter."""
    monkeypatch.setattr(op_module, "_backend", lambda *args: triton_kernels)
    if DEVICE == "cpu":
        register(triton_kernels)


def leaves_of(*shape, dtype=torch.float32, parameters=torch.float32, road="kernels"):
    torch.manual_seed(0)
    device = "cpu" if road == "cpu_road" else DEVICE
    x = torch.randn(shape, device=device).to(dtype)
    return [
        x.requires_grad_(),
        *(torch.randn(shape[1], device=device).to(parameters).requires_grad_() for _ in range(2)),
    ]


def gradients(function, leaves):
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, torch.cos(y.detach()))]


@pytest.fixture(scope="module")
def samples_of_pytorch():
    pytest.importorskip("expecttest", reason="PyTorch's own samples need expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    # the import above forbids what Detectron2's default_setup does
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return next(info for info in op_db if info.name == "nn.functional.group_norm")


@pytest.fixture
def cpu_road(monkeypatch):
    """Every input on a CPU goes to group_norm_cpu."""
    if not cpu_kernels.is_compiled():
        pytest.skip("gng_d2 was installed without a C compiler")
    monkeypatch.setattr(group_norm_cpu, "is_faster", lambda x, *args: x.is_contiguous())
    with Recorder() as recorder:
        yield
    assert "gng_d2.group_norm_apply.default" in recorder.ops


@pytest.mark.slow
@pytest.mark.parametrize("road", ["cpu_road", "kernels"])
def test_pytorchs_own_samples(road, samples_of_pytorch, request):
    request.getfixturevalue(road)
    seen = 0
    device = "cpu" if road == "cpu_road" else DEVICE
    for sample in samples_of_pytorch.reference_inputs(device, torch.float32, requires_grad=True):
        x = sample.input[:2].detach().requires_grad_()  # of 20 images Triton's interpreter would take half a minute
        (num_groups,), kwargs = sample.args, sample.kwargs
        if not x.numel():
            continue  # never gets there
        leaves = [x, *(t for t in kwargs.values() if torch.is_tensor(t))]
        ours, theirs = (f(x, num_groups, **kwargs) for f in (group_norm, F.group_norm))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        if kwargs.get("eps", 0) >= 0:
            grad = torch.cos(theirs.detach())
            for one, other in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad)):
                torch.testing.assert_close(one, other)
        seen += 1
    assert seen > 30


def test_pytorchs_own_errors(samples_of_pytorch):
    for case in samples_of_pytorch.error_inputs(DEVICE):
        sample = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            group_norm(sample.input, *sample.args, **sample.kwargs)
    for groups in (-1, 3):
        with pytest.raises(RuntimeError, match="groups"):
            group_norm(torch.randn(1, 64, 128, 128, device=DEVICE), groups)


@pytest.mark.parametrize("road", ["cpu_road", "kernels"])
@pytest.mark.parametrize("images", [1, 2])
def test_activation_in_place_may_follow(road, images, request):
    """As in Detectron2's ResNet."""
    request.getfixturevalue(road)
    leaves = leaves_of(images, 6, 5, 7, road=road)
    ours = gradients(lambda *t: F.relu_(group_norm(t[0], 2, *t[1:])), leaves)
    theirs = gradients(lambda *t: F.relu_(F.group_norm(t[0], 2, *t[1:])), leaves)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)


def test_parameters_that_are_views(kernels):
    x, _, _ = leaves_of(2, 6, 5, 7)
    parameters = torch.randn(2, 12, device=DEVICE).requires_grad_()

    def function(group_norm):
        y = group_norm(x, 2, parameters[0, ::2], parameters[1, :1].expand(6))
        return [y, *torch.autograd.grad(y, (x, parameters), torch.cos(y.detach()))]

    for one, other in zip(function(group_norm), function(F.group_norm)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("road", ["cpu_road", "kernels"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_take_a_gradient(road, wanted, request):
    request.getfixturevalue(road)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(leaves_of(2, 6, 5, 7, road=road))]
    inputs = [leaves[i] for i in wanted]
    ours, theirs = (
        torch.autograd.grad(f(leaves[0], 2, *leaves[1:]).cos().sum(), inputs) for f in (group_norm, F.group_norm)
    )
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)
    x = leaves[0].detach().requires_grad_()
    for one, other in zip(*(torch.autograd.grad(f(x, 2).cos().sum(), x) for f in (group_norm, F.group_norm))):
        torch.testing.assert_close(one, other)


def test_torch_func_and_forward_mode_take_pytorchs_op():
    x = torch.randn(1, 64, 128, 128)
    assert op_module._backend(x, 1, None, None, 1e-5) is group_norm_cpu or not cpu_kernels.is_compiled()
    gradient = torch.func.grad(lambda x: group_norm(x, 1).square().sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: F.group_norm(x, 1).square().sum())(x))
    assert torch.func.vmap(lambda x: group_norm(x, 1))(x[None]).shape == (1, *x.shape)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert torch.autograd.forward_ad.unpack_dual(group_norm(dual, 1)).tangent is not None


def test_autograd_through_the_kernels(kernels):
    leaves = leaves_of(2, 6, 5, 7)
    for one, other in zip(
        gradients(lambda *t: group_norm(t[0], 3, *t[1:]), leaves),
        gradients(lambda *t: F.group_norm(t[0], 3, *t[1:]), leaves),
    ):
        torch.testing.assert_close(one, other)


def test_gradient_in_another_layout_than_the_input(kernels):
    x, weight, bias = leaves_of(2, 6, 5, 7)
    for x in (x, x.contiguous(memory_format=torch.channels_last)):
        for format in (torch.contiguous_format, torch.channels_last):
            grad = torch.randn(x.shape, device=DEVICE).contiguous(memory_format=format)
            ours, theirs = (torch.autograd.grad(f(x, 2, weight, bias), x, grad)[0] for f in (group_norm, F.group_norm))
            torch.testing.assert_close(ours, theirs)


def test_input_that_is_neither_contiguous_nor_channels_last(kernels):
    x, weight, bias = leaves_of(2, 6, 10, 7)
    ours, theirs = (f(x[:, :, ::2], 2, weight, bias) for f in (group_norm, F.group_norm))
    torch.testing.assert_close(ours, theirs)


def test_bias_may_change_before_the_backward_pass(kernels):
    """As with PyTorch's op."""
    x, weight, bias = leaves_of(2, 4, 3, 3)
    y = group_norm(x, 2, weight, bias)
    with torch.no_grad():
        bias.add_(1)
    expected = torch.autograd.grad(F.group_norm(x, 2, weight, bias).sum(), bias)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), bias), expected)


def test_second_derivatives(kernels):
    leaves = leaves_of(2, 4, 3, 3)

    def second(function):
        y = function(leaves[0], 2, *leaves[1:])
        first = torch.autograd.grad(torch.sin(y).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for one, other in zip(second(group_norm), second(F.group_norm)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives_with_parameters_in_float32(kernels):
    leaves = leaves_of(1, 4, 8, 8, dtype=torch.float16)
    first = torch.autograd.grad(
        group_norm(leaves[0], 2, *leaves[1:]).float().square().sum(), leaves[0], create_graph=True
    )
    second = torch.autograd.grad(first[0].float().square().sum(), leaves[0])[0]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    first = torch.autograd.grad(F.group_norm(wide[0], 2, *wide[1:]).square().sum(), wide[0], create_graph=True)
    expected = torch.autograd.grad(first[0].square().sum(), wide[0])[0]
    assert second.dtype == torch.float16
    assert (second - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_type_of_its_input(kernels, dtype):
    """As under autocast, where the parameters stay in float32."""
    leaves = leaves_of(2, 6, 9, 9, dtype=dtype)
    y, dx, dweight, dbias = gradients(lambda *t: group_norm(t[0], 3, *t[1:]), leaves)
    assert y.dtype == dx.dtype == dtype and dweight.dtype == dbias.dtype == torch.float32
    wide = [t.detach().float().requires_grad_() for t in leaves]
    expected = F.group_norm(wide[0], 3, *wide[1:])
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    assert ((dweight - torch.autograd.grad(expected, wide[1], torch.cos(y.detach()).float())[0]).abs() < 1e-3).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (3, 6)])
def test_the_ops_keep_pytorchs_rules(kernels, shape):
    """Schema, fake tensors, and tracing by AOTAutograd."""
    x, weight, bias = (t.detach() for t in leaves_of(*shape))
    mean, rstd = torch.ops.gng_d2.group_norm_statistics(x, 2, 1e-5)
    for name, args in {
        "group_norm_statistics": (x, 2, 1e-5),
        "group_norm_apply": (x, mean, rstd, weight, bias, 2),
        "group_norm_backward": (torch.cos(x), x, mean, rstd, weight, 2),
    }.items():
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.gng_d2, name).default, args, test_utils=tests)


def test_compiles_without_a_graph_break(kernels):
    leaves = leaves_of(2, 6, 5, 7)

    def function(x, weight, bias):
        return group_norm(x.relu(), 2, weight, bias).square()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for one, other in zip(gradients(compiled, leaves), gradients(function, leaves)):
        torch.testing.assert_close(one, other)


def test_tracing_scripting_and_export_take_pytorchs_op(monkeypatch):
    x, weight, bias = (t.detach() for t in leaves_of(1, 64, 128, 128, road="cpu_road"))
    assert op_module._backend(x, 1, weight, bias, 1e-5) is group_norm_cpu or not cpu_kernels.is_compiled()

    class Norm(torch.nn.GroupNorm):
        def forward(self, x):
            return group_norm(x, 1, self.weight, self.bias)

    graphs = [
        str(torch.jit.trace(Norm(1, 64), x, check_trace=False).graph),
        str(torch.jit.script(group_norm).graph),
        str(torch.export.export(Norm(1, 64), (x,)).graph),
    ]
    assert not any("gng_d2::" in graph or "ops.gng_d2" in graph for graph in graphs)
    assert torch.equal(torch.jit.script(group_norm)(x, 1, weight, bias), F.group_norm(x, 1, weight, bias))


def fake(*shape, dtype=torch.float32, **kwargs):
    return torch.empty(shape, dtype=dtype, device="cuda", **kwargs)


H100 = 132  # multiprocessors


@needs_torch(2, 13, "torch.compile on fake tensors of a GPU that is not there")
@pytest.mark.parametrize("activation", [None, "relu"])
def test_compiles_on_cuda_without_a_graph_break(monkeypatch, activation):
    """On fake tensors, which need no GPU. The activation is left to the compiler."""
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: H100)
    monkeypatch.setattr(backends, "triton_works", lambda device_index: True)
    targets = []

    def keep(module, inputs):
        targets.extend(str(node.target) for m in module.modules() for node in m.graph.nodes)
        return module.forward

    with FakeTensorMode():
        leaves = [fake(2, 64, 200, 304, requires_grad=True), *(fake(64, requires_grad=True) for _ in range(2))]
        y = torch.compile(lambda x, w, b: group_norm(x.sin(), 1, w, b, 1e-5, activation), backend=keep, fullgraph=True)(
            *leaves
        )
        assert y.requires_grad and y.shape == leaves[0].shape
    assert any("relu" in target for target in targets) == (activation == "relu")
    ours = {target for target in targets if "gng_d2" in target}
    assert ours == {f"gng_d2.group_norm_{name}.default" for name in ("statistics", "apply", "backward")}, targets


@needs_torch(2, 11, "fake tensors of a GPU that is not there")
def test_choice_on_cuda(monkeypatch):
    """PyTorch's kernels where they fill the machine, ours where they do not or would copy the input."""
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: H100)

    def ours(x, num_groups, parameters=torch.float32):
        weight, bias = (fake(x.shape[1], dtype=parameters) for _ in range(2))
        return op_module._backend(x, num_groups, weight, bias, 1e-5) is triton_kernels

    monkeypatch.setattr(backends, "triton_works", lambda device_index: True)
    monkeypatch.setattr(backends, "_ordinary_types", (*backends._ordinary_types, FakeTensor))
    with FakeTensorMode():
        assert ours(fake(2, 256, 200, 304), 1)
        assert ours(fake(2, 64, 200, 304), 64)
        assert not ours(fake(2, 256, 200, 304), 128)
        assert not ours(fake(512, 256, 7, 7), 1)
        assert op_module._backend(fake(512, 256, 7, 7), 1, None, None, 1e-5, "relu") is triton_kernels
        assert not ours(fake(1, 64, 13, 19), 1)
        assert ours(fake(512, 256, 7, 7).contiguous(memory_format=torch.channels_last), 1)
        assert ours(fake(512, 256, 7, 7, dtype=torch.float16), 1)
        assert not ours(fake(512, 256, 7, 7, dtype=torch.float16), 1, torch.float16)
        with monkeypatch.context() as autocast:
            autocast.setattr(torch, "is_autocast_enabled", lambda device: True)
            assert ours(fake(512, 256, 7, 7, dtype=torch.float16), 1, torch.float16)
            assert not ours(fake(512, 256, 7, 7), 1)
        assert op_module._backend(fake(512, 256, 7, 7), 1, None, None, 1e-5, "relu") is triton_kernels
        assert not ours(fake(2, 256, 200, 304, dtype=torch.float64), 1, torch.float64)
        assert not ours(fake(0, 256, 200, 304), 1)
        # what PyTorch refuses is left to it
        assert not ours(fake(2, 256, 200, 304), 1, torch.float16)
        assert not ours(fake(2, 256, 200, 304), -1)
        assert not ours(fake(2, 256, 200, 304), 3)
        assert op_module._backend(fake(2, 256, 200, 304), 1, fake(255), None, 1e-5) is None
        assert op_module._backend(fake(2, 256, 200, 304), 1, torch.empty(256, device="cpu"), None, 1e-5) is None
        assert not ours(fake(1, 256, 1, 1, dtype=torch.float16), 256)


def test_without_a_c_compiler_pytorchs_op_is_used(monkeypatch):
    """Triton runs one when it first launches."""

    def fail(*args):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(backends, "_launch", fail)
    with pytest.warns(UserWarning, match="C compiler"):
        assert not backends._try_triton.__wrapped__(0)
