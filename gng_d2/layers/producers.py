"""Which layer makes the input of each norm, found by running the model: any code, frozen or not, on meta too."""

import random
import re
from collections.abc import Iterable
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from gng_d2.errors import InputError

from .kinds import Producer

__all__ = ["calls_with", "find_producers", "unchanged"]


def find_producers(
    model: nn.Module, norms: Iterable[nn.Module], example_inputs: Any
) -> dict[nn.Module, list[Producer | None]]:
    """Run ``model`` and return, for each norm that ran, what made its input, call by call; None: it cannot be seen.

    The model runs in eval mode and without gradients, and afterwards is what it was: its modes, its buffers, and the
    state of the random number generators.

    Args:
        example_inputs: what the model is called with. A tuple: its positional arguments; a dict: its keyword arguments;
            anything else (a tensor, Detectron2's list of dicts): its only argument. Where it cannot be called so, and
            the first thing in a tuple or list is a tensor, that is the only argument: a loader's (images, labels).
            Tensors are moved to the model's device.

    Raises:
        InputError: the model cannot be run with them.
    """
    model = getattr(model, "_orig_mod", model)  # not what torch.compile made of it
    device = next((t.device for t in _tensors_of(model)), torch.device("cpu"))
    with torch.inference_mode(False):
        inputs = tree_map(lambda x: x.detach().clone().to(device) if isinstance(x, Tensor) else x, example_inputs)
    failed = None
    for args, kwargs in calls_with(inputs):
        with unchanged(model), torch.inference_mode(False), torch.no_grad(), _Watch(model, set(norms)) as watch:
            watch.take_inputs(inputs)
            try:
                model.eval()  # what it returns is not asked for: a train() of the user's own may return nothing
                model(*args, **kwargs)
                return watch.found
            except InputError:
                raise
            except Exception as error:  # of any kind: it is the user's code
                failed = error
    raise InputError(
        f"example_inputs: {type(model).__name__} cannot be run with them in eval mode, to see which layer makes the "
        f"input of each norm: {type(failed).__name__}: {failed}"
    ) from failed


def calls_with(inputs):
    """The ways to call a model with ``inputs``, as (args, kwargs): the first that works is meant."""
    if isinstance(inputs, dict):
        yield (), inputs
        return
    yield (inputs if isinstance(inputs, tuple) else (inputs,)), {}
    if isinstance(inputs, (tuple, list)) and len(inputs) > 1 and isinstance(inputs[0], Tensor):
        yield (inputs[0],), {}


# what makes a tensor from an input and a weight, its first two arguments, and from a bias
_WEIGHT_OPS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)} | {"deform_conv2d", "linear"}
_WEIGHT_OPS |= {"convolution", "_convolution"}
_PRODUCTS = {"mm", "matmul", "__matmul__", "__rmatmul__", "bmm"}
_PRODUCTS_AND_BIAS = {"addmm", "baddbmm"}
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
# what, with a number, leaves a layer's output one: a group norm's input may have any scale
_SCALINGS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_DIVISIONS = {"div", "div_", "__truediv__", "__itruediv__", "divide"}
# what may copy, and leaves values and channels as they are
_COPIES = set("alias clone contiguous to type type_as float half bfloat16 double cpu cuda reshape flatten".split())
# what adds or replaces single values
_EDITS = {"pad", "masked_fill", "masked_fill_"}
_IN_PLACE = re.compile("[a-z]_$|^__i[a-z]+__$")
# the names of the arguments that are looked at, in their order
_NAMES = ("input", "mat1", "batch1", "weight", "other", "mat2", "batch2")


# PyTorch 2.0 calls no hook of a module that raises, which matters where the model catches that
_ALWAYS = {"always_call": True} if "always_call" in signature(nn.Module.register_forward_hook).parameters else {}


class _Watch(TorchFunctionMode):
    """While entered, knows what made each tensor, and notes it when a norm takes the tensor.

    A tensor is known by its storage, which its views share, and is another once its version is another, as after an op
    in place. Storages are referred to weakly: their memory is free to go, and their identity is not taken again.
    """

    def __init__(self, model, norms):
        super().__init__()
        self.found: dict[nn.Module, list[Producer | None]] = {}
        self._model, self._norms = model, norms
        self._made: dict[int, tuple[StorageWeakRef, int, int, Producer]] = {}
        self._running: list[nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self):
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and shows none of its ops
                continue
            self._hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, **_ALWAYS),
            ]
        self._parameters = {StorageWeakRef(p.untyped_storage()).cdata for p in _tensors_of(self._model)}
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def take_inputs(self, inputs):
        for tensor in tree_flatten(inputs)[0]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._record("the model's input", (), tensor)

    def _before(self, module, args, kwargs):
        self._running.append(module)
        if module in self._norms:
            self.found.setdefault(module, []).append(self._maker(args[0] if args else kwargs["input"]))

    def _after(self, module, args, output):
        self._running.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor):
                named = kwargs or {}
                given = (*args, *(named[name] for name in _NAMES if name in named))
                self._record(func.__name__, given, tensor)
        return out

    def _record(self, op, args, out):
        reference = StorageWeakRef(out.untyped_storage())
        known = self._made.get(reference.cdata)
        if known is not None and known[1] == out._version:
            return  # a view, or what an op gives back as it took it
        self._made[reference.cdata] = (reference, out._version, out.numel(), self._producer(op, args, out))

    def _producer(self, op, args, out):
        if op in _WEIGHT_OPS:
            axis = -1 if op == "linear" else 1 - args[1].dim()  # of an input with or without a batch
            return Producer(op, args[0].shape[axis], out.shape[axis], self._running[-1] if self._running else None)
        a, b = (*args[op in _PRODUCTS_AND_BIAS :], None, None)[:2]
        if op in _PRODUCTS | _PRODUCTS_AND_BIAS and self._is_parameter(b):
            return Producer(op, a.shape[-1], out.shape[-1], self._running[-1] if self._running else None)
        if op in _PRODUCTS and self._is_parameter(a) and min(a.dim(), b.dim()) > 1:  # channels come last but one
            return Producer(op, b.shape[-2], out.shape[-2], self._running[-1] if self._running else None)
        return self._maker(self._kept(op, a, b, out), int(bool(_IN_PLACE.search(op)))) or Producer(op)

    def _kept(self, op, a, b, out):
        """The argument whose layer is that of ``out`` too; None if there is none."""
        if op in _COPIES or (op in _EDITS and out.shape[1:2] == a.shape[1:2]) or (op in _DIVISIONS and _is_number(b)):
            return a
        if op in _SUMS | _SCALINGS:
            is_aside = self._is_parameter if op in _SUMS else _is_number  # a bias; a scale
            return a if is_aside(b) else b if is_aside(a) else None
        return None

    def _maker(self, tensor, changes=0) -> Producer | None:
        """What made ``tensor``, before the last ``changes`` in place."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return None
        _, version, numel, producer = self._made.get(
            StorageWeakRef(tensor.untyped_storage()).cdata, (None, None, None, None)
        )
        if producer is None:
            return None
        if version != tensor._version - changes:
            return Producer("an op in place")
        whole = numel == tensor.numel() or (tensor.dim() > 1 and tensor.shape[1] == producer.n_out)  # a crop of maps
        return producer if whole else Producer("a slice")

    def _is_parameter(self, x):
        return isinstance(x, Tensor) and StorageWeakRef(x.untyped_storage()).cdata in self._parameters


def _is_number(x):
    return not isinstance(x, Tensor) or x.numel() == 1


def _tensors_of(model):
    tensors = [*model.parameters(), *model.buffers()]
    return [t for t in tensors if not nn.parameter.is_lazy(t)]


@contextmanager
def unchanged(model):
    """Whatever happens within, ``model`` and the random number generators are the same again after it."""
    modes = {module: module.training for module in model.modules()}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]  # train() may freeze some
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None and not nn.parameter.is_lazy(buffer)
    ]
    devices = {t.device for t in _tensors_of(model) if t.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python), np.random.set_state(numpy)
        for module, training in modes.items():
            module.training = training
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
