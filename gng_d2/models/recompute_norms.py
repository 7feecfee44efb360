"""Group norm in the memory of a frozen batch norm: what is cheap is computed again in the backward pass."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial, reduce
from inspect import signature

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_flatten, tree_unflatten

from gng_d2.errors import InputError
from gng_d2.layers.class_change import StandIn, add, check_changeable, has, remove_everywhere
from gng_d2.layers.kinds import is_of_single_images
from gng_d2.layers.module_path import module_path
from gng_d2.layers.running import tensors_in
from gng_d2.ops.backends import enabled_kernels, is_transformed, set_kernels_enabled

from .kept_outputs import CastsOfWeights, KeptOutputs
from .second_run import State, differ, sums_of, versions_of

# The runs of a block whose output is compared with that of its recomputation: the first ones, and then one of so many.
_CHECKED_AT_FIRST, _CHECKED_EVERY = 3, 1000
# A Sequential of more norms runs again in parts. A residual block has up to 4, and a part keeps more than a block.
_NORMS_AT_ONCE = 4
# they run a model and do more: they prepare gradients, or compile
_WRAPPERS = "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"


def recompute_norms(model: nn.Module, enable: bool = True) -> nn.Module:
    """Make ``model`` keep no outputs of norms, activations and cheap convolutions for the backward pass.

    A norm keeps its input, and the convolution after it the norm's output, which is twice what a frozen batch norm
    takes; weight standardization keeps a copy of each weight. Each smallest module that runs a chain of
    convolutions and norms (a residual block, a head, a lateral convolution) then keeps its input, the outputs of
    its expensive convolutions and the statistics of norms that our kernels run, and computes the rest again when
    its gradients are wanted: :func:`torch.utils.checkpoint.create_selective_checkpoint_contexts`. A long
    ``Sequential`` of convolutions and norms (the features of a VGG) does so in parts, unless its norms are fused.
    Gradients are the same bits wherever the ops are deterministic, under autocast too.

    It acts in training mode and where gradients are computed. Parameters, buffers, hooks and the keys of the
    state_dict stay; the class of a module is replaced by a subclass of it, so that copies and pickles work. What
    torch.compile compiles is left to its own choice of what to compute again. Modules with norms that keep
    statistics of a batch, or with spectral norm, are left as they are: they must not run twice.

    A block that runs again finds its attributes, the lists and dicts in them and in its arguments, and the random
    numbers of PyTorch, Python and NumPy as they were when it first ran, and leaves no trace in them. What else it
    reads (a global variable, a generator of its own, a file) may have changed, so in its first three runs and in each
    thousandth its output is compared with that of its first run. Hooks of modules inside it run twice.

    Gradients can be taken through a block once. A second backward after ``retain_graph=True``, double backward, and
    losses that take gradients twice through the same block raise PyTorch's "Trying to backward an extra time" where the
    block keeps something that the first one uses up, as most do from their second step on.

    Args:
        model: changed in place, before or after DistributedDataParallel wraps it.
        enable: False undoes it.

    Returns:
        ``model``. The modules are logged, and :func:`recomputed_modules` names them.

    Raises:
        InputError: ``model`` has no such module, or PyTorch is older than 2.5. In training: a block changes its input
            or its buffers in place, its weights or buffers changed before the backward pass, or its output is another
            one when it is computed again.

    Examples::
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
        >>> recomputed_modules(nn.ModuleDict({"stem": recompute_norms(model)}))
        ['stem']
    """
    if not enable:
        for module in remove_everywhere(model, _Recomputed):
            module.__dict__.pop("_kept", None)
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
            f"spectral norm must not run twice; a torch.fx GraphModule runs all of its ops at once"
        )
    for _, module in chains:
        check_changeable(module)
    for _, module in chains:
        add(module, _Recomputed)
        module._kept = KeptOutputs()
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
    if not norms or is_of_single_images(module):
        return
    has_convolutions = any(isinstance(m, _ConvNd) for m in module.modules())
    is_wrapper = type(module).__name__ in _WRAPPERS or isinstance(module, GraphModule) or "forward" in vars(module)
    runs_them = _has_forward(module) and not is_wrapper and _own_norms(module) == norms
    if runs_them and has_convolutions and not _changes_itself(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _chains(child, f"{name}.{child_name}".strip("."))


def _norms_in(module):
    return {m for m in module.modules() if is_of_single_images(m)}


def _own_norms(module):
    """The norms that the module's own ``forward`` runs.

    They are its children, or in its lists, or in a child that is one layer with its norm, as torchvision's
    Conv2dNormActivation and a shortcut are.
    """
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
    _kept = None  # KeptOutputs, which replicas of DataParallel share; torch.jit.script reads annotations

    @classmethod
    def method_of(cls, wrapped):
        # Detectron2's heads compute losses and write logs in `forward`, and have their layers in `layers`
        layers = getattr(wrapped, "layers", None)
        return "layers" if callable(layers) and len(signature(layers).parameters) > 1 else "forward"

    def run(self, method, args, kwargs):
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or is_transformed():
            return method(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        if not tensors or not any(t.requires_grad for ts in (tensors, self.parameters()) for t in ts):
            return method(*args, **kwargs)
        if self._kept is None:  # a slice of a Sequential is of its class
            self._kept = KeptOutputs()
        is_checked = self._kept.runs < _CHECKED_AT_FIRST or self._kept.runs % _CHECKED_EVERY == 0
        self._kept.runs += 1
        if method.__func__ is nn.Sequential.forward and sum(map(is_of_single_images, self)) > _NORMS_AT_ONCE:
            return _run_in_parts(self, is_checked, *args, **kwargs)
        return _Run(self, method, is_checked, tensors).start(args, kwargs)


def _run_in_parts(sequential, is_checked, input):
    """Run a long Sequential in parts, each of which is computed again by itself. A part begins at a norm, because the
    norm's input is the output of a convolution and kept anyway."""
    parts = [[]]
    for module in sequential:
        if is_of_single_images(module):
            parts.append([])
        parts[-1].append(module)
    output = reduce(_call, parts[0], input)
    for part in parts[1:]:
        output = _Run(sequential, partial(reduce, _call, part), is_checked, tensors_in(output)).start((output,), {})
    return output


def _call(x, module):
    return module(x)


class _Run:
    """One run of a block: the checkpoint calls it with the leaves of its arguments, now and in the backward pass."""

    def __init__(self, module, method, is_checked, inputs):
        self._module, self._method, self._is_checked, self._inputs = module, method, is_checked, inputs
        self._versions = None  # until the first run has ended
        self._kernels = enabled_kernels()  # when it runs again, the switch may stand otherwise
        self._before = State(module)

    def start(self, args, kwargs):
        # What the block writes to the lists and dicts that it is called with is for the caller, so it first runs with
        # those themselves. When it runs again it has new ones, which hold what the caller's held at first.
        self._arguments = args, kwargs
        leaves, self._structure = tree_flatten((args, kwargs))
        contexts = partial(torch_checkpoint.create_selective_checkpoint_contexts, self._module._kept.policy())
        # a recomputation that stops early does not compute the output
        whole = torch_checkpoint.set_checkpoint_early_stop(False) if self._is_checked else nullcontext()
        with whole:
            return torch_checkpoint.checkpoint(self, *leaves, use_reentrant=False, context_fn=contexts)

    def __call__(self, *leaves):
        with CastsOfWeights(), set_kernels_enabled(self._kernels):
            if self._arguments is not None:
                return self._first()
            now = State(self._module)
            self._before.restore()
            try:
                return self._again(*tree_unflatten(list(leaves), self._structure))
            finally:
                now.restore()

    def _first(self):
        (args, kwargs), inputs = self._arguments, self._inputs
        self._arguments = self._inputs = None  # the checkpoint holds them, and may keep them elsewhere
        own = [tensor for tensor in self._before.tensors() if not isinstance(tensor, nn.Parameter)]
        versions = versions_of(inputs), versions_of(own)
        output = self._module._kept.run(self._method, args, kwargs)
        if versions_of(inputs) != versions[0]:
            raise self._changes("input in place", "Have its first layer not do so (inplace=False), or leave it out")
        if versions_of(own) != versions[1]:
            raise self._changes("buffers or other tensors of its own in place", "Leave it out")
        self._versions = versions_of(self._before.tensors())
        self._sums = sums_of(output) if self._is_checked else None
        return output

    def _changes(self, what, mend):
        return InputError(
            f"{module_path(self._module)}: running it changes its {what}, so it cannot be computed again in the "
            f"backward pass. {mend}: recompute_norms(that_module, enable=False)"
        )

    def _again(self, args, kwargs):
        if self._versions is None:
            raise InputError(
                f"{module_path(self._module)}: it takes gradients through itself while it runs, and cannot be computed "
                f"again for them. Leave it out: recompute_norms(that_module, enable=False)"
            )
        if versions_of(self._before.tensors()) != self._versions:
            raise InputError(
                f"{module_path(self._module)}: its weights changed before the backward pass, or its buffers, and it is "
                f"computed again with them. Call backward() before optimizer.step() and what else changes them, or "
                f"leave it out: recompute_norms(that_module, enable=False)"
            )
        try:
            output = self._method(*args, **kwargs)
        except RuntimeError as error:
            if "has been mutated" not in str(error):  # PyTorch's, of an output that was kept
                raise
            raise InputError(
                f"{module_path(self._module)}: the output of a convolution in it was changed in place, and was not in "
                f"earlier runs. Have what follows it not do so (inplace=False), or leave it out: "
                f"recompute_norms(that_module, enable=False)"
            ) from error
        if self._is_checked and differ(self._sums, sums := sums_of(output)):
            raise InputError(
                f"{module_path(self._module)}: its output is another one when it is computed again in the backward "
                f"pass, so its gradients would be wrong (sums and sums of squares {sums}, in the forward pass "
                f"{self._sums}). Does it draw from a random number generator of its own, count its runs, or read what "
                f"has changed since? Leave it out: recompute_norms(that_module, enable=False)"
            )
        return output
