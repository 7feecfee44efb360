"""Time calls against each other, on a CPU or with CUDA."""

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median, quantiles

import torch

from command_line import count


def add_timing(parser, seconds: float, images: Sequence[int], each: str) -> None:
    """Give ``parser`` the flags that the measurements of costs have; ``each``: what is timed for ``--seconds``."""
    parser.add_argument(
        "--images",
        type=count,
        nargs="+",
        default=list(images),
        help=f"images in a batch; default: {' '.join(map(str, images))}",
    )
    parser.add_argument(
        "--size", type=count, nargs=2, default=[800, 1216], metavar=("HEIGHT", "WIDTH"), help="default: 800 1216"
    )
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", default=devices[-1], choices=devices, help="default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"for each {each}; default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the file of --json")


def rounds(calls: Sequence[Callable[[], object]], device: str, seconds: float) -> list[list[float]]:
    """Times of each of ``calls`` in milliseconds, one a round: they run in turn, for about ``seconds`` each.

    On CUDA with an empty cache; on a CPU right after the same call, if that leaves anything in the caches.
    """
    timed, fewest = (_timer_on_cuda(), 10) if device == "cuda" else (_timed_on_cpu, 3)
    times = [[timed(call) for call in calls]]
    count = max(fewest, min(200, int(seconds * len(calls) * 1e3 / sum(times[0]))))
    times += [[timed(call) for call in calls] for _ in range(count - 1)]
    return [list(of_call) for of_call in zip(*times)]


def milliseconds(calls: Sequence[Callable[[], object]], device: str, seconds: float) -> list[float]:
    """Median time of each of ``calls``, see :func:`rounds`."""
    return [median(of_call) for of_call in rounds(calls, device, seconds)]


def ratio_quartiles(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """First and third quartile, over the rounds, of a call's time as a ratio to another's in the same round.

    Above 1 the first says that the call is the slower one in three quarters of the rounds, beyond their noise.
    """
    first, _, third = quantiles([time / other for time, other in zip(times, reference)], n=4)
    return [first, third]


def _timed_on_cpu(call):
    for _ in range(2):
        start = time.perf_counter()
        call()
        elapsed = (time.perf_counter() - start) * 1e3
        if elapsed > 1e3:  # a second one would not find anything of it in the caches
            break
    return elapsed


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
