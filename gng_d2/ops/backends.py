"""Whether kernels of ours may run: what is installed, what PyTorch is doing, and a switch that turns them off."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gng_d2.errors import InputError

__all__ = [
    "HAS_DETECTRON2",
    "HAS_OPS",
    "HAS_TRITON",
    "is_compiling",
    "is_plain",
    "is_transformed",
    "kernels_may_run",
    "set_kernels_enabled",
]

_detectron2 = find_spec("detectron2")
# Any folder of that name, such as a clone that is not installed, is a package too, but one without an origin.
HAS_DETECTRON2 = _detectron2 is not None and _detectron2.origin is not None
# Older versions of PyTorch have no way to register an op that torch.compile can go through.
HAS_OPS = hasattr(torch.library, "register_fake")
# PyTorch 2.0 has no torch.compiler
is_compiling = getattr(torch, "compiler", torch._utils).is_compiling
try:
    import triton  # noqa: F401

    HAS_TRITON = HAS_OPS
except ImportError:  # Triton is not made for every platform
    HAS_TRITON = False


def _kernels_enabled_by_environment():
    value = os.environ.get("GNG_D2_KERNELS") or "1"
    if value not in ("0", "1"):
        raise InputError(f"the environment variable GNG_D2_KERNELS is {value!r}: set it to 0 (kernels off) or 1 (on)")
    return value == "1"


_kernels_enabled = _kernels_enabled_by_environment()


class set_kernels_enabled:
    """Turn the kernels of this package on or off; where they are off, PyTorch's own ops compute everything.

    This is for whoever suspects a kernel of ours: if the fault stays with them off, it lies elsewhere. It holds for all
    threads, from the call on or, as a context, until its end; a backward pass takes what its forward pass took. The
    environment variable ``GNG_D2_KERNELS=0`` turns them off when the program starts.

    Args:
        enabled: False turns them off, True on again. At first they are on.

    Examples::
        >>> from gng_d2.ops import group_norm, set_kernels_enabled
        >>> x = torch.randn(1, 64, 128, 128)
        >>> with set_kernels_enabled(False):
        ...     torch.equal(group_norm(x, num_groups=1), torch.nn.functional.group_norm(x, num_groups=1))
        True
    """

    def __init__(self, enabled: bool):
        global _kernels_enabled
        self._before = _kernels_enabled
        _kernels_enabled = bool(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        global _kernels_enabled
        _kernels_enabled = self._before


def kernels_may_run() -> bool:
    """Whether kernels of ours are on, and PyTorch is not doing something for which it wants its own ops."""
    return _kernels_enabled and HAS_OPS and not is_transformed()


def is_transformed() -> bool:
    """Whether torch.jit.trace, torch.export, torch.func or forward-mode differentiation is at work."""
    if is_compiling():
        return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may read these without PyTorch's dispatcher.

    It may not where a mode watches ops, or a tensor is of a subclass, lazily negated, or without memory.
    """
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_neg() and t.data_ptr()) for t in tensors
    )
