"""Whatever is passed to group_norm: what PyTorch's op returns, or its error."""

import ctypes
from fractions import Fraction

import numpy as np
import pytest
import torch
from needs import needs_torch
from torch import nn
from torch.nn import functional as F

from gng_d2.ops import cpu_kernels, group_norm, standardize_weight

pytestmark = pytest.mark.usefixtures("threads")

NUMBERS = {
    "0-d tensor": torch.tensor(2),
    "0-d float tensor": torch.tensor(2.0),
    "0-d tensor with gradient": torch.tensor(2.0, requires_grad=True),
    "0-d small tensor": torch.tensor(1e-5),
    "0-d bool tensor": torch.tensor(True),
    "0-d meta tensor": torch.tensor(2, device="meta"),
    "1-d tensor": torch.tensor([2]),
    "2 numbers": torch.tensor([2, 2]),
    "parameter": nn.Parameter(torch.tensor(1e-5)),
    "np.int64": np.int64(2),
    "np.int8": np.int8(2),
    "np.uint64": np.uint64(2),
    "np.float32": np.float32(1e-5),
    "np.float64": np.float64(1e-5),
    "np.float64 of an int": np.float64(2),
    "np.bool": np.bool_(True),
    "0-d array": np.array(2),
    "1-d array": np.array([2]),
    "True": True,
    "False": False,
    "int": 2,
    "0": 0,
    "-1": -1,
    "3": 3,
    "65": 65,
    "128": 128,
    "2**31": 2**31,
    "2**63": 2**63,
    "10**400": 10**400,
    "-(10**400)": -(10**400),
    "2.0": 2.0,
    "2.5": 2.5,
    "1e-5": 1e-5,
    "-0.5": -0.5,
    "-2.0": -2.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "complex": 2 + 0j,
    "fraction": Fraction(2),
    "str": "2",
    "bytes": b"2",
    "None": None,
    "list": [2],
    "object": object(),
}
DRAWN = np.random.default_rng(0).standard_normal((1, 64, 64, 64)).astype("float32")


def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error)


def assert_as_pytorch(*args, **kwargs):
    ours, theirs = outcome(group_norm, *args, **kwargs), outcome(F.group_norm, *args, **kwargs)
    if isinstance(theirs, torch.Tensor):
        assert ours.requires_grad == theirs.requires_grad
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    else:
        assert ours is theirs


@pytest.fixture(params=[False, True], ids=["no_grad", "grad"])
def x(request):
    """Large enough for our kernels."""
    with torch.set_grad_enabled(request.param):
        yield torch.from_numpy(DRAWN).clone().requires_grad_(request.param)


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_any_num_groups_and_any_eps(x, number):
    weight, bias = torch.randn(2, 64)
    for affine in ((), (weight, bias)):
        assert_as_pytorch(x, number, *affine)
        assert_as_pytorch(x, 2, *affine, eps=number)
        assert_as_pytorch(x, number, *affine, eps=number)


class Wrapped(torch.Tensor):
    """A subclass with a group norm of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.group_norm:
            return "its own"
        return super().__torch_function__(function, types, args, kwargs or {})


ZERO = needs_torch(2, 14, "PyTorch's op on a tensor of zeros without memory")


def cases(tensors):
    return [pytest.param(t, id=name, marks=ZERO if name == "zero" else ()) for name, t in tensors.items()]


OTHERS = {
    "array": np.ones(64, "float32"),
    "list": [1.0] * 64,
    "int": 1,
    "float": 1.0,
    "str": "weight",
    "bool": True,
    "0-d": torch.tensor(1.0),
    "short": torch.ones(63),
    "long": torch.ones(65),
    "empty": torch.ones(0),
    "row": torch.ones(1, 64),
    "column": torch.ones(64, 1),
    "double": torch.ones(64).double(),
    "half": torch.ones(64).half(),
    "int64": torch.ones(64, dtype=torch.int64),
    "bool tensor": torch.ones(64, dtype=torch.bool),
    "complex": torch.ones(64, dtype=torch.complex64),
    "strided": torch.randn(128)[::2],
    "backwards": torch.randn(64).flip(0),
    "expanded": torch.randn(1).expand(64),
    "parameter": nn.Parameter(torch.randn(64)),
    "negated": torch._neg_view(torch.randn(64)),
    "zero": torch._efficientzerotensor(64),
    "meta": torch.ones(64, device="meta"),
    "sparse": torch.ones(64).to_sparse(),
    "object": object(),
    "wrapped": torch.ones(64).as_subclass(Wrapped),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", cases(OTHERS))
def test_any_weight_and_any_bias(x, other):
    for args in ((other,), (None, other), (other, other)):
        ours, theirs = outcome(group_norm, x, 2, *args), outcome(F.group_norm, x, 2, *args)
        if isinstance(theirs, torch.Tensor) and not theirs.is_meta:
            torch.testing.assert_close(ours, theirs)
        elif isinstance(theirs, torch.Tensor):
            assert ours.is_meta and ours.shape == theirs.shape
        else:
            assert ours == theirs


INPUTS = {
    "array": DRAWN,
    "list": [1.0],
    "int": 1,
    "None": None,
    "str": "x",
    "double": torch.from_numpy(DRAWN).double(),
    "half": torch.from_numpy(DRAWN).half(),
    "int64": torch.ones(1, 64, 64, 64, dtype=torch.int64),
    "complex": torch.ones(1, 64, 64, 64, dtype=torch.complex64),
    "0-d": torch.tensor(1.0),
    "1-d": torch.ones(2**18),
    "2-d": torch.ones(4096, 64),
    "2 channels of one": torch.ones(1, 2, 1),
    "no image": torch.ones(0, 64, 64, 64),
    "no channel": torch.ones(1, 0, 64, 64),
    "no position": torch.ones(1, 64, 0, 64),
    "channels-last": torch.from_numpy(DRAWN).contiguous(memory_format=torch.channels_last),
    "transposed": torch.from_numpy(DRAWN).transpose(2, 3),
    "expanded": torch.randn(1, 64, 1, 1).expand(1, 64, 64, 64),
    "negated": torch._neg_view(torch.from_numpy(DRAWN)),
    "zero": torch._efficientzerotensor((1, 64, 64, 64)),
    "parameter": nn.Parameter(torch.from_numpy(DRAWN)),
    "sparse": torch.ones(1, 64, 64, 64).to_sparse(),
    "wrapped": torch.ones(1, 64, 64, 64).as_subclass(Wrapped),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("input", cases(INPUTS))
def test_any_input(input, grad):
    with torch.set_grad_enabled(grad):
        for num_groups in (1, 2, 0):
            ours, theirs = outcome(group_norm, input, num_groups), outcome(F.group_norm, input, num_groups)
            if isinstance(theirs, torch.Tensor):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
            else:
                assert ours == theirs


def test_symbolic_tracing_takes_pytorchs_op():
    class Norm(nn.Module):
        def forward(self, x):
            return group_norm(x, 2)

    graph = torch.fx.symbolic_trace(Norm())
    assert F.group_norm in {node.target for node in graph.graph.nodes}


@pytest.mark.skipif(not cpu_kernels.is_compiled(), reason="gng_d2 was installed without a C compiler")
def test_only_what_is_declared_a_pointer_becomes_an_address():
    weight, out = torch.randn(2, 4, 9)
    for numbers in ((4.0, 9, 1e-5), (4, None, 1e-5), (4, weight, 1e-5), (4, 9, weight), (4, 9, None), (4, 9)):
        with pytest.raises((TypeError, ctypes.ArgumentError)):
            cpu_kernels.call("standardize", (weight, out), *numbers)
    with pytest.raises(AttributeError):
        cpu_kernels.call("standardize", (weight, 4), 4, 9, 1e-5)
    cpu_kernels.call("standardize", (weight, out), torch.tensor(4), 9, torch.tensor(1e-5))  # as the numbers they are
    torch.testing.assert_close(out, standardize_weight(weight))
