"""Find out which layer makes the input of each norm by running the model, which may be frozen or on the meta device."""

import re
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gng_d2.errors import InputError

from .kinds import Producer, layer_sizes
from .origin import UNKNOWN, Origin, layer_output, op_kind, origin
from .running import calls_with, eager, tensors_in, tensors_of, unchanged, uncompiled


def find_producers(
    model: nn.Module, norms: Iterable[nn.Module], example_inputs: Any
) -> dict[nn.Module, list[Producer | None]]:
    """Run ``model`` and return what made the input of each norm in each of its calls, None where that is unknown.

    The model runs in eval mode and without gradients. Its modes, its buffers, and the random number generators are
    restored afterwards.

    Args:
        example_inputs: what the model is called with. A tuple holds positional arguments, a dict keyword arguments;
            anything else (a tensor, Detectron2's list of dicts) is the only argument. If that call fails and the
            first thing in a tuple or list is a tensor, the model is called with this tensor alone, so a loader's
            (images, labels) will do. Tensors are moved to the model's device.

    Raises:
        InputError: the model cannot be run with them.
    """
    model = uncompiled(model)
    device = next((t.device for t in tensors_of(model)), torch.device("cpu"))
    with torch.inference_mode(False):
        inputs = tree_map_only(Tensor, lambda x: x.detach().clone().to(device), example_inputs)
    failed = None
    for args, kwargs in calls_with(inputs):
        try:
            return _find(model, set(norms), args, kwargs)
        except InputError:
            raise
        except Exception as error:  # the user's code may raise any error
            failed = error
    raise InputError(
        f"example_inputs: {type(model).__name__} cannot be run with them in eval mode, to see which layer makes the "
        f"input of each norm: {type(failed).__name__}: {failed}"
    ) from failed


def _find(model, norms, args, kwargs):
    watch = _Watch()
    watch.take(tensors_in((args, kwargs)), "the model's input")
    watch.take(model.buffers(), "a buffer")
    with unchanged(model), eager(), torch.inference_mode(False), torch.no_grad():
        model.eval()  # not chained: a train() that the user wrote may return nothing
        with _noting(model, norms, watch) as found, watch:
            model(*args, **kwargs)
    return found


# PyTorch 2.0 does not call the hooks of a module that raises. This matters where the model catches the error
_ALWAYS = {"always_call": True} if "always_call" in signature(nn.Module.register_forward_hook).parameters else {}
# ops that make new numbers; their tensors only give a shape, or are written to
_MAKES_NUMBERS = re.compile("like$|^(new|fill|zero|uniform|normal|bernoulli|random|exponential|empty)")
_EMPTY = re.compile("^(new_)?empty")
_CONVOLUTION = re.compile("^_?convolution|deform_conv2d")


class _Watch(TorchDispatchMode):
    """Knows the origin of each tensor while the context is entered.

    A tensor is identified by its storage and its place there, because Python's tensor objects change on the way through
    PyTorch's dispatcher. Weak references to storages let their memory go, and keep their identity from being reused.
    """

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.running: list[nn.Module] = []
        # storage -> its reference, the origin of the whole storage, and the origins of its views
        self._known: dict[int, tuple[StorageWeakRef, Origin, dict[tuple, Origin]]] = {}

    def take(self, tensors: Iterable[Tensor], what: str) -> None:
        for tensor in tensors:
            if not nn.parameter.is_lazy(tensor):
                shape = tuple(tensor.shape)
                self._note(tensor, Origin(Producer(what), shape, shape, value=object()))

    def origin(self, tensor: Tensor) -> Origin:
        if nn.parameter.is_lazy(tensor):
            return UNKNOWN
        storage, shape = _storage(tensor), tuple(tensor.shape)
        if isinstance(tensor, nn.Parameter):  # a parameter of the model, or one that a lazy layer just made
            return Origin(Producer("a parameter"), shape, shape, parameters=2, value=storage and storage.cdata)
        if storage is None or storage.cdata not in self._known:
            return Origin(None, shape, shape)
        _, whole, views = self._known[storage.cdata]
        return views.get(_place(tensor)) or origin("slice", [whole], shape, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        with self:  # composite ops, which inference mode does not decompose
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        op, written = func._schema.name.rpartition("::")[2], _written(func, args, kwargs)
        given = [t for t in tensors_in(args) if t.is_floating_point() or t.is_complex()]
        operands = [] if _MAKES_NUMBERS.search(op_kind(op)) else [self.origin(t) for t in given]
        out = func(*args, **kwargs)
        for tensor in written:
            self._write(tensor, self._origin(op, operands, given, tensor))
        for tensor in tensors_in(out):
            if not any(tensor is t for t in written):
                groups = args[8] if op == "convolution" else 1
                self._note(tensor, self._origin(op, operands, given, tensor, groups))
        return out

    def _origin(self, op, operands, given, out, conv_groups=1):
        shape, value = tuple(out.shape), object()
        if _CONVOLUTION.search(op):
            source, weight = operands[:2]
            found = layer_output(op, (given[0].shape[1], shape[1]), weight, lambda: source, shape, value, conv_groups)
        elif _EMPTY.search(op):
            found = Origin(None, shape, shape, value=value)  # something that is not seen may be written there
        else:
            found = origin(op, operands, shape, value)
        if value in found.layers and found.made is not None and found.made.is_layer and self.running:
            layer = self.running[-1]
            if layer_sizes(layer) == found.made[1:3]:
                op = type(layer).__name__
            found = found._replace(made=found.made._replace(op=op, layer=layer))
        return found

    def _note(self, tensor, found):
        storage = _storage(tensor)
        if storage is None:
            return
        _, _, views = self._known.setdefault(storage.cdata, (storage, found, {}))
        views[_place(tensor)] = found

    def _write(self, tensor, found):
        """Note that ``tensor`` has the origin ``found`` now, which changes all tensors in the same storage."""
        storage = _storage(tensor)
        if storage is None:
            return
        _, whole, _ = self._known.pop(storage.cdata, (None, None, None))
        if whole is not None and tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
            written = found._replace(shape=whole.shape, size=whole.shape)
            found = origin("copy_slices", [whole, written], whole.shape, object())
            self._known[storage.cdata] = (storage, found, {})
        else:
            self._note(tensor, found)


def _written(func, args, kwargs):
    """The arguments that ``func`` changes."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += tensors_in(value)
    return written


def _storage(tensor):
    if tensor.layout != torch.strided or nn.parameter.is_lazy(tensor):
        return None
    return StorageWeakRef(tensor.untyped_storage())


def _place(tensor):
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


@contextmanager
def _noting(model, norms, watch):
    """Yield a dict that is filled, while the model runs, with what made the input of each of ``norms`` in each call."""
    found: dict[nn.Module, list[Producer | None]] = {}

    def before(module, args, kwargs):
        watch.running.append(module)
        if module in norms and (tensors := tensors_in((args, kwargs))):
            found.setdefault(module, []).append(watch.origin(tensors[0]).made)

    def after(module, args, output):
        watch.running.pop()

    with ExitStack() as hooks:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, **_ALWAYS).remove)
        yield found
