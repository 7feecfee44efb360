"""Whether kernels of ours may run: what is installed, what PyTorch is doing, and which of them are turned on."""

import logging
import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gng_d2.errors import InputError

_detectron2 = find_spec("detectron2")
# Any folder of that name, such as a clone that is not installed, is a package too, but one without an origin.
HAS_DETECTRON2 = _detectron2 is not None and _detectron2.origin is not None
# Older versions of PyTorch have no way to register an op that torch.compile can go through.
HAS_OPS = hasattr(torch.library, "register_fake")
# PyTorch 2.0 has no torch.compiler
is_compiling = getattr(torch, "compiler", torch._utils).is_compiling
try:
    import triton

    HAS_TRITON = HAS_OPS
except ImportError:  # Triton is not made for every platform
    HAS_TRITON = False

if HAS_TRITON:

    @triton.jit
    def _nothing_kernel(ptr):
        pass


# Which kernels run unless the user says otherwise. Those for CUDA do once docs/results holds what a GPU measured.
DEFAULT_KERNELS = "cpu"
_STATES = ("off", "cpu", "cuda")


def _state_of(value, place):
    if value not in _STATES:
        raise InputError(
            f"{place} is {value!r}: set it to off (PyTorch's own ops compute everything), cpu (the kernels for the CPU "
            f"run) or cuda (those for the CPU and for CUDA run). The default is {DEFAULT_KERNELS}"
        )
    return value


_enabled_kernels = _state_of(
    os.environ.get("GNG_D2_KERNELS") or DEFAULT_KERNELS, "the environment variable GNG_D2_KERNELS"
)
_ordinary_types = (Tensor, nn.Parameter)


class set_kernels_enabled:
    """Choose which kernels of this package run; PyTorch's own ops compute the rest.

    Turn them off where you suspect a kernel of ours: if the fault stays, it lies elsewhere. Those for CUDA are off at
    first, because no GPU has measured them yet. The choice holds for all threads, from the call on or, as a context,
    until its end; a backward pass takes what its forward pass took. The environment variable ``GNG_D2_KERNELS`` makes
    the choice when the program starts.

    Args:
        enabled: ``"off"``, ``"cpu"`` (the kernels for the CPU run) or ``"cuda"`` (those for the CPU and for CUDA run).
            False is ``"off"``, True is the default, ``"cpu"``.

    Raises:
        InputError: ``enabled`` is something else.

    Examples::
        >>> from gng_d2.ops import group_norm, set_kernels_enabled
        >>> x = torch.randn(1, 64, 128, 128)
        >>> with set_kernels_enabled("off"):
        ...     torch.equal(group_norm(x, num_groups=1), torch.nn.functional.group_norm(x, num_groups=1))
        True
    """

    def __init__(self, enabled: bool | str):
        global _enabled_kernels
        self._before = _enabled_kernels
        if isinstance(enabled, bool):
            enabled = DEFAULT_KERNELS if enabled else "off"
        _enabled_kernels = _state_of(enabled, "the argument of set_kernels_enabled")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        global _enabled_kernels
        _enabled_kernels = self._before


def enabled_kernels() -> str:
    """Which kernels are on: ``"off"``, ``"cpu"`` or ``"cuda"``."""
    return _enabled_kernels


def kernels_may_run() -> bool:
    """Whether any kernels are on, and PyTorch is doing nothing for which it wants its own ops.

    Ask this before anything about tensors, which are recorded while PyTorch traces.
    """
    return _enabled_kernels != "off" and HAS_OPS and not is_transformed()


def is_on(device: torch.device) -> bool:
    """Whether the kernels for ``device`` are on and work.

    Ask this last, for tensors that they would take: the log says once that the kernels for CUDA are off.
    """
    if device.type == "cuda" and _enabled_kernels != "cuda":
        if not is_compiling():  # a compiler cannot trace a logger
            _log_that_cuda_is_off()
        return False
    return device.type == "cpu" or triton_works(device.index)


@cache
def _log_that_cuda_is_off():
    logging.getLogger(__name__).info(
        "PyTorch's own ops compute group norm and weight standardization on CUDA: no GPU has measured the kernels of "
        "gng_d2 yet, so they are off. GNG_D2_KERNELS=cuda turns them on, `make gpu` tests and measures them"
    )


def triton_works(device_index: int) -> bool:
    """Whether Triton is installed and can launch a kernel on this CUDA device."""
    return HAS_TRITON and _try_triton(device_index)


# torch.compiler.assume_constant_result sets this too, but first imports torch._dynamo, which takes a second.
triton_works._dynamo_marked_constant = True


@cache
def _try_triton(device_index):
    """Triton needs a C compiler when it first launches, which a slim container may not have."""
    try:
        _launch(device_index)
    except Exception as error:  # of any kind: it runs a compiler
        warnings.warn(f"Triton does not work here, so PyTorch's own ops are used: {error}", stacklevel=2)
        return False
    return True


def _launch(device_index):
    with torch.cuda.device(device_index):
        _nothing_kernel[(1,)](torch.zeros(1, device=f"cuda:{device_index}"))


_PROXY = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "PROXY", None)  # of make_fx; PyTorch 2.0 has none


def is_transformed() -> bool:
    """Whether torch.jit.trace, torch.export, torch.func, forward-mode differentiation or make_fx (without its
    pre_dispatch) is at work."""
    if is_compiling():
        return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or (_PROXY is not None and torch._C._get_dispatch_mode(_PROXY) is not None)
    )


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether these are dense tensors and of no subclass, which may have ops of its own and no memory."""
    return all(t is None or (type(t) in _ordinary_types and t.layout is torch.strided) for t in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may read these, which are ordinary, without PyTorch's dispatcher.

    It may not where a mode watches ops, or a tensor is lazily negated or has no memory.
    """
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        t is None or (not t.is_neg() and t.data_ptr()) for t in tensors
    )
