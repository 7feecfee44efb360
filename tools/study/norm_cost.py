"""What a norm costs: the norms of a model, their implementations, and how long each takes."""

import ctypes
import importlib
import time
from contextlib import suppress
from functools import lru_cache, partial
from statistics import median
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from gng_d2.analysis import build_on_meta
from gng_d2.ops.group_norm import _GroupNorm, group_norm

__all__ = ["norm_inputs", "implementations", "norm_rows", "milliseconds", "copy_bandwidth", "keep_freed_memory"]

NormInput = Tuple[Tuple[int, ...], int]  # shape, num_groups


def norm_inputs(cfg: CfgNode, images: int, height: int, width: int) -> List[NormInput]:
    """Shape of the input and number of groups of each distinct group norm of a detector, in their order.

    Backbone, box head (with as many proposals as in training) and semantic head are run on the meta device: no
    memory, no arithmetic.
    """
    model = build_on_meta(cfg)
    inputs = {}
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda norm, args, y: inputs.setdefault((tuple(y.shape), norm.num_groups)))
    with torch.no_grad():
        features = model.backbone(torch.empty(images, 3, height, width, device="meta"))
        if hasattr(model, "sem_seg_head"):
            model.sem_seg_head.layers(features)
        channels = next(iter(features.values())).shape[1]
        per_image = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        size = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        model.roi_heads.box_head(torch.empty(images * per_image, channels, size, size, device="meta"))
    return list(inputs)


def _frozen_batch_norm(x, num_groups, weight, bias):
    # Detectron2's are buffers, which take no gradient
    return x * weight.detach().view(1, -1, 1, 1) + bias.detach().view(1, -1, 1, 1)


def _var_mean(x, num_groups, weight, bias):
    groups = x.reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
    z = ((groups - mean) * (variance + 1e-5).rsqrt()).view(x.shape)
    return z * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def _liger(x, num_groups, weight, bias, op):
    return op(x, weight, bias, x.shape[1], num_groups, 1e-5)


def _apex(x, num_groups, weight, bias, op):
    return _apex_module(op, num_groups, x.shape[1], x.device, x.dtype)(x)


@lru_cache(maxsize=None)
def _apex_module(op, num_groups, channels, device, dtype):
    return op(num_groups, channels, device=device, dtype=dtype)


def _sglang_with_silu(x, num_groups, weight, bias, op):
    return op(x, weight, bias, num_groups, 1e-5)


# of other packages: what adapts it, module, attribute, whether it has a backward
_OTHERS = {
    "liger": (_liger, "liger_kernel.ops.group_norm", "LigerGroupNormFunction.apply", True),
    "apex": (_apex, "apex.contrib.group_norm", "GroupNorm", True),
    "sglang_with_silu": (
        _sglang_with_silu,
        "sglang.jit_kernel.diffusion.triton.group_norm_silu",
        "triton_group_norm_silu",
        False,
    ),
}


def implementations(device: str) -> Dict[str, Tuple[Callable, bool]]:
    """By name, ``f(x, num_groups, weight, bias)`` and whether it has a backward.

    ``ours`` is the op, which picks; ``ours_always`` never picks PyTorch's. The compiled ones and ``ours_always`` are
    there on CUDA, those of other packages where they are installed.
    """
    all_of_them = {
        "native": (F.group_norm, True),
        "ours": (group_norm, True),
        "frozen_bn": (_frozen_batch_norm, True),
        "var_mean": (_var_mean, True),
    }
    if device == "cuda":
        all_of_them["ours_always"] = (lambda x, g, w, b: _GroupNorm.apply(x, w, b, g, 1e-5), True)
        for name, options in (("compiled", None), ("compiled_cooperative", {"triton.cooperative_reductions": True})):
            all_of_them[name] = (torch.compile(F.group_norm, dynamic=False, options=options), True)
    for name, (adapter, module, attribute, has_backward) in _OTHERS.items():
        with suppress(ImportError, AttributeError):
            op = importlib.import_module(module)
            for part in attribute.split("."):
                op = getattr(op, part)
            all_of_them[name] = (partial(adapter, op=op), has_backward)
    return all_of_them


# passes over a tensor that does not fit into a cache: moments, read, write; then two sums, and read, read, write
_PASSES = {"forward": 3, "forward+backward": 8}


def norm_rows(
    shape: Tuple[int, ...],
    num_groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    device: str,
    bandwidth: float,
    seconds: float,
) -> Iterator[Dict]:
    """One row for each direction and implementation. ``bandwidth`` of a copy in bytes a second.

    ``native_gn32`` is timed twice, as ``native_gn32_again`` too: the difference is the run's noise.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (torch.randn(shape).to(device, dtype, memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    weight, bias = (torch.randn(shape[1]).to(device, dtype).requires_grad_() for _ in range(2))

    def forward(function, groups):
        with torch.no_grad():
            return function(x, groups, weight, bias)

    def forward_and_backward(function, groups):
        return torch.autograd.grad(function(x, groups, weight, bias), (x, weight, bias), dy, allow_unused=True)

    if device == "cuda":
        torch._dynamo.reset()  # else torch.compile gives up after eight shapes and runs what it should compile
    available = implementations(device)
    native = available["native"][0]
    for direction, run in (("forward", forward), ("forward+backward", forward_and_backward)):
        calls = {"native_gn32": partial(run, native, 32)}
        calls |= {
            name: partial(run, function, num_groups)
            for name, (function, has_backward) in available.items()
            if has_backward or run is forward
        }
        calls["native_gn32_again"] = partial(run, native, 32)
        calls = {name: call for name, call in calls.items() if _runs(name, call, shape)}
        times = dict(zip(calls, milliseconds(list(calls.values()), device, seconds)))
        least = _PASSES[direction] * x.numel() * x.element_size() / bandwidth * 1e3
        for name, time_of_call in times.items():
            yield {
                "shape": list(shape),
                "num_groups": 32 if name.startswith("native_gn32") else num_groups,
                "dtype": str(dtype).removeprefix("torch."),
                "layout": "channels_last" if channels_last else "contiguous",
                "direction": direction,
                "implementation": name,
                "milliseconds": time_of_call,
                "ratio_to_native_gn32": time_of_call / times["native_gn32"],
                "fraction_of_copy_bandwidth": least / time_of_call,
            }


def _runs(name, call, shape):
    """Whether the first call, which may compile, succeeds: other packages refuse some shapes, types or layouts."""
    try:
        call()
    except Exception as error:
        tqdm.write(f"{name} is left out for {shape}: {type(error).__name__}: {error}")
        return False
    return True


def milliseconds(calls: Sequence[Callable[[], object]], device: str, seconds: float) -> List[float]:
    """Median time of each of ``calls``, run in turn for about ``seconds`` each.

    On CUDA with an empty cache, on a CPU right after the same call.
    """
    timed, fewest = (_timer_on_cuda(), 20) if device == "cuda" else (_timed_on_cpu, 3)
    rounds = max(fewest, min(200, int(seconds * len(calls) * 1e3 / sum(map(timed, calls)))))
    times = [[timed(call) for call in calls] for _ in range(rounds)]
    return [median(of_call) for of_call in zip(*times)]


def _timed_on_cpu(call):
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _timer_on_cuda():
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def timed(call):
        cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return timed


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of a tensor of 256 MiB."""
    source = torch.empty(2**26, device=device).normal_()
    target = torch.empty_like(source)
    (time_of_copy,) = milliseconds([lambda: target.copy_(source)], device, 1.0)
    return 2 * source.numel() * source.element_size() / (time_of_copy / 1e3)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, as CUDA's allocator does: else page faults are timed, not arithmetic."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0), libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
