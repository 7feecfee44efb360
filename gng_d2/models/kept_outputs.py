"""What a block keeps for the backward pass when its norms are computed again.

That is the outputs of its expensive layers, and the statistics of its norms, so that only their last pass runs again.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils import _python_dispatch, checkpoint

from gng_d2.layers.running import tensors_in
from gng_d2.ops.backends import HAS_OPS

from .second_run import versions_of

# Multiply-adds for an element of an output that is kept. The 3x3 convolutions of a ResNet-50 cost 576 to 4608, the
# first 1x1 ones of its blocks 64 to 2048, the last and widest ones 64 to 512. Backbone and FPN of PGN+WS then keep 1.10
# of what those of FrozenBN keep (1100 multiply-adds: 1.05, 2200: 0.99).
_MIN_KEPT_COST = 600

_aten = torch.ops.aten
_STATISTICS = torch.ops.gng_d2.group_norm_statistics.default if HAS_OPS else None
_APPLY = torch.ops.gng_d2.group_norm_apply.default if HAS_OPS else None
_FACTOR = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}


@torch.jit.unused
class KeptOutputs:
    """Which expensive outputs of a module can be kept: those that no in-place op changes, as ReLU may a convolution's.

    Kinds of outputs are told apart and not single outputs, because their number and order may change with the size of
    the images. A kind that no run has been watched with is computed again.
    """

    runs = 0  # of the module so far; models that were pickled before have none of their own

    def __init__(self):
        self._is_changed: dict[tuple, bool | None] = {}  # by kind; None: no run with it has been watched
        self._is_new = True

    def policy(self) -> Callable:
        """The policy of a checkpoint of one run, and of its recomputation."""
        kept = {kind for kind, is_changed in self._is_changed.items() if is_changed is False}

        def policy(context, op, *args, **kwargs):
            if op is _STATISTICS:
                return checkpoint.CheckpointPolicy.MUST_SAVE
            if _is_expensive(op, args):
                if (kind := _kind(op, args)) in kept:
                    return checkpoint.CheckpointPolicy.MUST_SAVE
                self._is_changed.setdefault(kind)
            return checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

        return policy

    def run(self, method: Callable, args: tuple, kwargs: dict) -> Any:
        """Run the module. If it may have kinds of outputs that are not known yet, they are watched.

        An output that it returns counts as changed, because its caller may do that later.
        """
        if not self._is_new and None not in self._is_changed.values():
            return method(*args, **kwargs)
        with _Watch() as watch:
            result = method(*args, **kwargs)
        self._is_new = False
        returned = {t.untyped_storage()._cdata for t in tensors_in(result)}
        for kind, output, versions in watch.outputs:
            # ReLU's gradient needs the output of _APPLY itself, so that no caller may change it
            is_returned = kind[0] != str(_APPLY) and output.untyped_storage()._cdata in returned
            is_changed = is_returned or versions_of([output]) != versions
            self._is_changed[kind] = is_changed or self._is_changed.get(kind) or False
        return result


class CastsOfWeights(_python_dispatch.TorchDispatchMode):
    """Hides autocast's casts of weights from the checkpoint, which expects the same ops when a block runs again.

    Autocast casts a weight once in a forward pass, in the first run that uses it, and again in the backward pass.
    """

    # as in PyTorch's modes for checkpoints: compiled parts stay compiled
    ignore_compile_internals = classmethod(lambda cls: True)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        is_cast = op is _aten._to_copy.default and args[0].is_leaf and args[0].requires_grad
        with _python_dispatch._pop_mode_temporarily() if is_cast else nullcontext():
            return op(*args, **(kwargs or {}))


class _Watch(_python_dispatch.TorchDispatchMode):
    """Notes the outputs that could be kept."""

    ignore_compile_internals = classmethod(lambda cls: True)

    def __init__(self):
        super().__init__()
        self.outputs = []  # (kind, output, its versions)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        output = op(*args, **(kwargs or {}))
        if _is_expensive(op, args):
            self.outputs.append((_kind(op, args), output, versions_of([output])))
        return output


def _kind(op, args):
    return str(op), tuple(args[1].shape) if op is _aten.convolution.default else ()


def _is_expensive(op, args):
    if op is _APPLY:
        # The output of norm, addition and relu is what a residual block returns. The next block keeps it anyway, as its
        # input, and relu's gradient needs it.
        activation, residual = (*args[6:], None, None)[:2]
        return activation == "relu" and residual is not None
    return _cost(op, args) >= _MIN_KEPT_COST


def _cost(op, args):
    """Multiply-adds for an element of the output of a convolution or product of matrices; 0 for other ops."""
    if op is _aten.convolution.default:
        weight, stride, transposed, groups = args[1], args[3], args[6], args[8]
        if transposed:
            return weight.numel() // (weight.shape[1] * groups * math.prod(stride))
        return weight.numel() // weight.shape[0]
    return args[_FACTOR[op]].shape[-1] if op in _FACTOR else 0
