"""Group norm in the memory of a frozen batch norm: what is cheap is computed again in the backward pass."""

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from gng_d2.errors import InputError
from gng_d2.layers.class_change import StandIn, add, has, remove
from gng_d2.ops.backends import is_transformed, kernels_may_run, set_kernels_enabled

__all__ = ["recompute_norms", "recomputed_modules"]

# Multiply-adds for an element of an output that is kept. The 3x3 convolutions of a ResNet-50 cost 576 to 4608, the
# first 1x1 ones of its blocks 64 to 2048, the last and widest ones 64 to 512. Backbone and FPN of PGN+WS then keep 1.10
# of what those of FrozenBN keep (1100 multiply-adds: 1.05, 2200: 0.99), and a step of Faster R-CNN takes 1.03 of the
# time of a CPU that it takes without (1100: 1.07).
_MIN_KEPT_COST = 600

_aten = torch.ops.aten
_FACTOR = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}


def recompute_norms(model: nn.Module, enable: bool = True) -> nn.Module:
    """Make ``model`` keep no outputs of norms, activations and cheap convolutions for the backward pass.

    A norm keeps its input, and the convolution after it the norm's output, which is twice what a frozen batch norm
    takes; weight standardization keeps a copy of each weight. Each smallest module that runs a chain of convolutions
    and norms (a residual block, a head, a lateral convolution) then keeps its input and the outputs of its expensive
    convolutions alone, and computes the rest again when its gradients are wanted:
    :func:`torch.utils.checkpoint.create_selective_checkpoint_contexts`. Gradients are the same bits wherever the ops
    are deterministic.

    It acts in training mode and where gradients are computed. Parameters, buffers, hooks and the keys of the
    state_dict stay; the class of a module is replaced by a subclass of it, so that copies and pickles work. What
    torch.compile compiles is left to its own choice of what to compute again. Modules with norms that keep
    statistics of a batch, or with spectral norm, are left as they are: they must not run twice.

    A block can be passed backward once: ``retain_graph=True`` with a second backward, double backward, and losses
    that take gradients twice through the same block raise PyTorch's "Trying to backward an extra time".

    Args:
        model: changed in place, before or after DistributedDataParallel wraps it.
        enable: False undoes it.

    Returns:
        ``model``. The modules are logged, and :func:`recomputed_modules` names them.

    Raises:
        InputError: ``model`` has no such module, or PyTorch is older than 2.5.

    Examples::
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
        >>> recomputed_modules(nn.ModuleDict({"stem": recompute_norms(model)}))
        ['stem']
    """
    if not enable:
        for module in model.modules():
            if has(module, _Recomputed):
                remove(module, _Recomputed)
                module.__dict__.pop("_changed_in_place", None)
        return model
    if not hasattr(torch_checkpoint, "create_selective_checkpoint_contexts"):
        raise InputError(
            f"recompute_norms needs PyTorch 2.5 or newer, which can choose what a checkpoint keeps; this is "
            f"{torch.__version__}. Install a newer one: pip install 'torch>=2.5'"
        )
    chains = list(_chains(model))
    if not chains:
        raise InputError(
            f"recompute_norms: {type(model).__name__} has no module that holds convolutions with norms of single "
            f"images (GroupNorm, LayerNorm). FrozenBN keeps nothing that could be computed again; BatchNorm and "
            f"spectral norm must not run twice"
        )
    for _, module in chains:
        add(module, _Recomputed)
    taken = sum(len(_norms_in(module)) for _, module in chains)
    logging.getLogger(__name__).info(
        f"computed again in the backward pass: {taken} of {len(_norms_in(model))} norms, in "
        + ", ".join(f"{name or 'the model'} ({type(module).__name__})" for name, module in chains)
    )
    return model


def recomputed_modules(model: nn.Module) -> list[str]:
    """The names of the modules of ``model`` that :func:`recompute_norms` took."""
    return [name for name, module in model.named_modules() if has(module, _Recomputed)]


# Which modules


def _chains(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the outermost modules that run all of their norms themselves.

    Larger ones (a stage, a backbone) would compute all of their blocks again at once.
    """
    norms = _norms_in(module)
    if not norms or _is_norm(module):
        return
    has_convolutions = any(isinstance(m, _ConvNd) for m in module.modules())
    runs_them = _has_forward(module) and not _is_wrapper(module) and _own_norms(module) == norms
    if runs_them and has_convolutions and not _changes_itself(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _chains(child, f"{name}.{child_name}".strip("."))


def _is_norm(module):
    """Whether it normalizes each image by itself; also Detectron2's and timm's LayerNorms of channels."""
    kinds = nn.GroupNorm, nn.LayerNorm, _InstanceNorm
    return isinstance(module, kinds) or "LayerNorm" in type(module).__name__


def _norms_in(module):
    return {m for m in module.modules() if _is_norm(m)}


def _own_norms(module):
    """The norms that the module's own ``forward`` runs: its children, those of its layers and lists, and those of
    children that are one layer with its norm, as torchvision's Conv2dNormActivation and a shortcut are."""
    own = set()
    for child in module.children():
        norms = _norms_in(child)
        if len(norms) == 1 and sum(isinstance(m, (_ConvNd, nn.Linear)) for m in child.modules()) <= 1:
            own |= norms
        elif not _has_forward(child):
            own |= _own_norms(child)
    return own


def _has_forward(module):
    return type(module).forward is not nn.Module.forward  # lists and dicts of modules have none


def _is_wrapper(module):
    """Whether it runs a model and does more: it prepares gradients, or compiles."""
    names = "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"
    return type(module).__name__ in names


def _changes_itself(module):
    """Whether it has statistics of batches, or spectral norm, which take another step each time they run."""
    return any(
        (isinstance(m, _NormBase) and m.track_running_stats)
        or type(m).__name__ == "_SpectralNorm"
        or any(type(hook).__name__ == "SpectralNorm" for hook in m._forward_pre_hooks.values())
        for m in module.modules()
    )


# How they run


class _Recomputed(StandIn):
    """A module that keeps little of what it computes, and computes it again in the backward pass."""

    order = 2

    # which of its expensive outputs, in their order, an in-place op changes: those cannot be kept. None: not known yet
    _changed_in_place = None

    @classmethod
    def method_of(cls, original):
        # Detectron2's heads compute losses and write logs in `forward`, and have their layers in `layers`
        return "layers" if callable(getattr(original, "layers", None)) else "forward"

    def run(self, method, args, kwargs):
        return _run(self, method, args, kwargs)


def _run(module, method, args, kwargs):
    if not (module.training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or is_transformed():
        return method(*args, **kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not any(t.requires_grad for ts in (tensors, module.parameters()) for t in ts):
        return method(*args, **kwargs)

    kernels_on = kernels_may_run()  # when it runs again, the switch may stand otherwise

    def run(watch):
        watches = [watch]

        def forward(*leaves):
            args, kwargs = tree_unflatten(list(leaves), structure)
            without_cache = _without_autocast_cache(tensors[0].device.type)
            with watches.pop() if watches else nullcontext(), without_cache, set_kernels_enabled(kernels_on):
                return method(*args, **kwargs)

        policy = partial(_policy, module._changed_in_place or (), {False: 0, True: 0})
        contexts = partial(torch_checkpoint.create_selective_checkpoint_contexts, policy)
        return torch_checkpoint.checkpoint(forward, *leaves, use_reentrant=False, context_fn=contexts)

    if module._changed_in_place is None:
        random_state = torch.get_rng_state(), torch_checkpoint.get_device_states(*tensors)
        watch = _Watch(module, tensors)
        output = run(watch)
        module._changed_in_place = watch.changed()
        if not module._changed_in_place:
            return output
        torch.set_rng_state(random_state[0])
        torch_checkpoint.set_device_states(*random_state[1])
    return run(nullcontext())


def _without_autocast_cache(device_type):
    """What autocast has cached when a module first runs, it has not when the module runs again."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


def _policy(changed_in_place, counts, context, op, *args, **kwargs):
    """Keep the outputs whose elements cost most."""
    if _cost(op, args) >= _MIN_KEPT_COST:
        counts[context.is_recompute] += 1
        if counts[context.is_recompute] - 1 not in changed_in_place:
            return torch_checkpoint.CheckpointPolicy.MUST_SAVE
    return torch_checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


class _Watch(TorchDispatchMode):
    """Sees, when a module first runs, what it changes in place: inputs, its buffers, or outputs that would be kept."""

    def __init__(self, module, inputs):
        super().__init__()
        self._name = type(module).__name__
        # in inference mode a tensor has no version
        self._inputs = [(tensor, tensor._version) for tensor in inputs if not tensor.is_inference()]
        self._buffers = [(buffer, buffer._version) for buffer in module.buffers()]
        self._outputs = []

    @classmethod
    def ignore_compile_internals(cls):  # as PyTorch's modes for checkpoints: what is compiled inside runs compiled
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        output = op(*args, **(kwargs or {}))
        if _cost(op, args) >= _MIN_KEPT_COST:
            self._outputs.append((output, output._version))
        return output

    def changed(self):
        """The places of the outputs, a convolution's before a ReLU say.

        Raises:
            InputError: inputs or buffers were changed.
        """
        inputs, outputs = _changed(self._inputs), _changed(self._outputs)
        self._inputs, self._outputs = [], []
        if inputs:
            raise self._error("input in place", "Have its first layer not do so (inplace=False), or leave it out")
        if _changed(self._buffers):
            raise self._error("buffers", "Leave it out")
        return outputs

    def _error(self, what, mend):
        return InputError(
            f"{self._name}: running it changes its {what}, so it cannot be computed again in the backward pass. "
            f"{mend}: recompute_norms(that_module, enable=False)"
        )


def _changed(tensors):
    """The places of those that are of another version than the one beside them."""
    return frozenset(place for place, (tensor, version) in enumerate(tensors) if tensor._version != version)


def _cost(op, args):
    """Multiply-adds for an element of the output of a convolution or product of matrices; 0 for other ops."""
    if op is _aten.convolution.default:
        weight, stride, transposed, groups = args[1], args[3], args[6], args[8]
        if transposed:
            return weight.numel() // (weight.shape[1] * groups * math.prod(stride))
        return weight.numel() // weight.shape[0]
    return args[_FACTOR[op]].shape[-1] if op in _FACTOR else 0
