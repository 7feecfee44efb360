"""Time calls against each other, on a CPU or with CUDA."""

import ctypes
import time
from contextlib import suppress
from statistics import median
from typing import Callable, List, Sequence

import torch

__all__ = ["add_timing", "milliseconds", "copy_bandwidth", "keep_freed_memory"]


def add_timing(parser, seconds: float, images: Sequence[int], each: str) -> None:
    """Give ``parser`` the flags that both measurements of costs have; ``each``: what is timed for ``--seconds``."""
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=list(images),
        help=f"images in a batch; default: {' '.join(map(str, images))}",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=[800, 1216], metavar=("HEIGHT", "WIDTH"), help="default: 800 1216"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=seconds, help=f"for each {each}; default: %(default)s")


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
