"""Run anyone's model, with what anyone calls it with, and leave it as it was."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


def calls_with(inputs: Any) -> Iterator[tuple[tuple, dict]]:
    """The ways to call a model with ``inputs``, as (args, kwargs). The first one that works is used."""
    if isinstance(inputs, dict):
        yield (), inputs
        return
    yield (inputs if isinstance(inputs, tuple) else (inputs,)), {}
    if isinstance(inputs, (tuple, list)) and len(inputs) > 1 and isinstance(inputs[0], Tensor):
        yield (inputs[0],), {}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile wrapped, or ``model``."""
    wrapped = model._modules.get("_orig_mod")
    return model if wrapped is None else wrapped


def eager() -> AbstractContextManager:
    """A context in which the compiled parts of a model run uncompiled, so that their ops are seen."""
    set_stance = getattr(getattr(torch, "compiler", None), "set_stance", None)  # since PyTorch 2.6
    return set_stance("force_eager") if set_stance else nullcontext()


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in a tuple, list or dict, or in several of them inside each other."""
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers, without those of lazy layers that have no shape yet."""
    tensors = [*model.parameters(), *model.buffers()]
    return [t for t in tensors if not nn.parameter.is_lazy(t)]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A context that restores ``model`` and the random number generators at its end, whatever happens in it. Buffers
    that are sparse or nested keep the values that they have then."""
    modes = {module: module.training for module in model.modules()}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]  # train() may freeze some
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None and not nn.parameter.is_lazy(buffer)
    ]
    devices = {t.device for t in tensors_of(model) if t.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python), np.random.set_state(numpy)
        for module, training in modes.items():
            module.training = training
        for parameter, trains in trained:
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if _differs(buffer, value):  # written only then, as an expanded one cannot be
                    buffer.resize_(value.shape).copy_(value)  # an observer of quantization changes its shape


def _differs(buffer, value):
    if buffer.layout != torch.strided or buffer.is_nested or buffer.is_meta or torch.equal(buffer, value):
        return False
    has_nan = buffer.shape == value.shape and (buffer.is_floating_point() or buffer.is_complex())
    return not (has_nan and torch.allclose(buffer, value, rtol=0, atol=0, equal_nan=True))
