"""What a norm costs: each distinct norm of Faster R-CNN R-50-FPN GN+WS and of Panoptic FPN's semantic head, under PGN.

All implementations run in turn, in one run: times are medians, to be read as ratios. Each norm has the groups that
PGN gives it; `native` is PyTorch's op at the same groups, `native_gn32` at 32. `frozen_bn` is the affine map of each
channel alone, `learned` is LGN, `our_kernels` never picks PyTorch's op as `ours` does. On CUDA the cache is flushed
before each call, and the compiled forms of PyTorch's op are timed too; on a CPU each call follows one of itself. Other
packages (Liger-Kernel, apex, SGLang's, which adds a SiLU and has no backward) are timed where they are installed.

A row's fraction_of_copy_bandwidth counts one pass over the tensor for each time that group norm must read or write
the data of a tensor larger than the caches: 3 forward (moments, read, write), 8 with the backward (sums: 2,
gradient: 3). Of a tensor smaller than a GPU's L2, what is read a second time is there: 2 and 6.

--after times what follows a norm, too, in place and in ops of its own as models run it: relu, or the addition of a
shortcut and relu. `fused` is our op with all of it, `frozen_bn_one_pass` a frozen batch norm that reads and writes a
tensor once where Detectron2's has a product and then a sum. An addition counts 1 pass forward, 3 with the backward.

With --resume the inputs that are in the file of --json are not measured again, and it is written after each input: so
a run that was cut off goes on.

On CUDA the time of small inputs is that of the host which launches. On a CPU the C library is told to keep
memory that is freed, as CUDA's allocator does; otherwise page faults take most of the time of large inputs,
whatever the norm.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from statistics import geometric_mean, median, quantiles

import torch
from torch.nn import functional as F
from tqdm import tqdm

from command_line import add_outputs
from gng_d2.job.files import prepare_outputs
from gng_d2.ops import cpu_kernels, group_sizes, learned_group_norm, set_kernels_enabled
from gng_d2.ops.group_norm import _backend, _GroupNorm, group_norm

from .detector_norms import detector_norms
from .rows import machine, markdown, rows_to_keep, write_rows
from .timing import add_timing, copy_bandwidth, keep_freed_memory, ratio_quartiles, rounds

AFTER = ("nothing", "relu", "add_relu")

_EPS = 1e-5


@dataclass(frozen=True)
class NormCostRow:
    """The time of one implementation on one input."""

    shape: list[int]
    num_groups: int
    dtype: str
    layout: str  # "contiguous" or "channels_last"
    direction: str  # "forward" or "forward+backward"
    implementation: str
    milliseconds: float  # the median
    ratio_to_native_gn32: float
    fraction_of_copy_bandwidth: float
    machine: str
    ratio_quartiles: list[float] | None = None  # of the ratio to native_gn32 in a round; None in older rows
    kernels: bool | None = None  # of `ours`: whether it picked our kernels; None of others
    after: str = "nothing"  # what follows the norm and is timed with it; one of AFTER
    quartiles_to_ours: list[float] | None = None  # of the ratio, in a round, to `ours`; None in older rows

    def input(self) -> tuple:
        return tuple(self.shape), self.num_groups, self.dtype, self.layout


def _frozen_batch_norm(x, num_groups, weight, bias):
    # Detectron2's are buffers, which take no gradient
    return x * weight.detach().view(1, -1, 1, 1) + bias.detach().view(1, -1, 1, 1)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.batch_norm(x, torch.zeros_like(bias), torch.ones_like(weight), weight, bias, eps=0)

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0].view(1, -1, 1, 1), None, None


def _frozen_in_one_pass(x, num_groups, weight, bias):
    return _OnePass.apply(x, weight.detach(), bias.detach())


def _var_mean(x, num_groups, weight, bias):
    groups = x.reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
    z = ((groups - mean) * (variance + _EPS).rsqrt()).view(x.shape)
    return z * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def _learned(x, num_groups, weight, bias):
    return learned_group_norm(x, _mixtures(x.shape[1], x.device, x.dtype), weight, bias, _EPS)


@cache
def _mixtures(channels, device, dtype):
    return torch.ones(2, len(group_sizes(channels)), device=device, dtype=dtype).softmax(1).requires_grad_()


def _liger(x, num_groups, weight, bias, op):
    return op(x, weight, bias, x.shape[1], num_groups, _EPS)


def _apex(x, num_groups, weight, bias, op):
    return _apex_module(op, num_groups, x.shape[1], x.device, x.dtype)(x)


@cache
def _apex_module(op, num_groups, channels, device, dtype):
    return op(num_groups, channels, device=device, dtype=dtype)


def _sglang_with_silu(x, num_groups, weight, bias, op):
    return op(x, weight, bias, num_groups, _EPS)


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


def implementations(device: str) -> dict[str, tuple[Callable, bool]]:
    """By name, ``f(x, num_groups, weight, bias)`` and whether it has a backward.

    ``ours`` is the op, which picks; ``our_kernels`` never picks PyTorch's. The compiled ones are there on CUDA, our
    kernels where they are, those of other packages where they are installed.
    """
    known = {
        "native": (F.group_norm, True),
        "ours": (group_norm, True),
        "learned": (_learned, True),
        "frozen_bn": (_frozen_batch_norm, True),
        "var_mean": (_var_mean, True),
    }
    if device == "cuda" or cpu_kernels.is_compiled():
        known["our_kernels"] = (lambda x, g, w, b: _GroupNorm.apply(x, w, b, g, _EPS, None, None), True)
    if device == "cuda":
        for name, options in (("compiled", None), ("compiled_cooperative", {"triton.cooperative_reductions": True})):
            with suppress(RuntimeError):  # an older inductor lacks the option
                known[name] = (torch.compile(F.group_norm, dynamic=False, options=options), True)
    for name, (adapter, module, attribute, has_backward) in _OTHERS.items():
        with suppress(ImportError, AttributeError):
            op = importlib.import_module(module)
            for part in attribute.split("."):
                op = getattr(op, part)
            known[name] = (partial(adapter, op=op), has_backward)
    return known


# passes over a tensor larger than the caches: moments, read, write; then two sums, and read, read, write
_PASSES = {"forward": 3, "forward+backward": 8}
_PASSES_IN_L2 = {"forward": 2, "forward+backward": 6}


def _passes(direction: str, size: int, l2: int, added: bool = False) -> int:
    """Over a tensor of ``size`` bytes, on a GPU with an L2 of ``l2`` bytes (0 on a CPU)."""
    return (_PASSES_IN_L2 if size < l2 else _PASSES)[direction] + added * (1 if direction == "forward" else 3)


def _l2_bytes(device):
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device == "cuda" else 0


def _then(function: Callable, residual: torch.Tensor | None) -> Callable:
    """The function, and an addition and relu, in ops of their own."""

    def run(*arguments):
        y = function(*arguments)
        if residual is not None:
            y += residual
        return F.relu_(y)

    return run


def norm_rows(
    shape: tuple[int, ...],
    num_groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    device: str,
    bandwidth: float,
    seconds: float,
    names: Sequence[str] | None = None,
    after: str = "nothing",
) -> Iterator[NormCostRow]:
    """Time each implementation in each direction. ``bandwidth`` of a copy in bytes a second.

    ``names``: of the implementations beside ``native``, ``ours`` and those that are there for what comes ``after``;
    None: all.

    ``native_gn32`` is timed twice, as ``native_gn32_again`` too: the difference is the run's noise.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, dy, shortcut = (torch.randn(shape).to(device, dtype, memory_format=memory_format) for _ in range(3))
    residual = shortcut.requires_grad_() if after == "add_relu" else None
    inputs = [x.requires_grad_(), *(() if residual is None else (residual,))]
    weight, bias = (torch.randn(shape[1]).to(device, dtype).requires_grad_() for _ in range(2))

    def forward(function, groups):
        with torch.no_grad():
            return function(x, groups, weight, bias)

    def forward_and_backward(function, groups):
        return torch.autograd.grad(function(x, groups, weight, bias), (*inputs, weight, bias), dy, allow_unused=True)

    available = {
        name: implementation
        for name, implementation in implementations(device).items()
        if names is None or name in ("native", "ours", *names)
    }
    if after != "nothing":
        available["frozen_bn_one_pass"] = _frozen_in_one_pass, True
        available = {name: (_then(function, residual), both) for name, (function, both) in available.items()}
        available["fused"] = (lambda x, g, w, b: group_norm(x, g, w, b, _EPS, "relu", residual)), True
    if "compiled" in available:
        torch._dynamo.reset()  # else torch.compile gives up after eight shapes and runs what it should compile
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
        times = dict(zip(calls, rounds(list(calls.values()), device, seconds)))
        medians = {name: median(of_call) for name, of_call in times.items()}
        size = x.numel() * x.element_size()
        least = _passes(direction, size, _l2_bytes(device), residual is not None) * size / bandwidth * 1e3
        kernels = _backend(x, num_groups, weight, bias, _EPS) is not None
        for name, time_of_call in medians.items():
            yield NormCostRow(
                shape=list(shape),
                num_groups=32 if name.startswith("native_gn32") else num_groups,
                dtype=str(dtype).removeprefix("torch."),
                layout="channels_last" if channels_last else "contiguous",
                direction=direction,
                implementation=name,
                milliseconds=time_of_call,
                ratio_to_native_gn32=time_of_call / medians["native_gn32"],
                fraction_of_copy_bandwidth=least / time_of_call,
                machine=machine(device),
                ratio_quartiles=ratio_quartiles(times[name], times["native_gn32"]),
                kernels=kernels if name == "ours" else None,
                after=after,
                quartiles_to_ours=ratio_quartiles(times[name], times["ours"]),
            )


def _runs(name, call, shape):
    """Whether the first call, which may compile, succeeds: other packages refuse some shapes, types or layouts."""
    try:
        call()
    except Exception as error:
        tqdm.write(f"{name} is left out for {shape}: {type(error).__name__}: {error}")
        return False
    return True


def table(rows: list[NormCostRow]) -> str:
    """Ratios of time over all inputs, the noise of the run, and the slowest inputs of ours."""
    lines, noise, values = [], [], {}
    for row in rows:
        key = row.dtype, row.layout, row.direction, row.implementation + f", {row.after}" * (row.after != "nothing")
        values.setdefault(key, []).append(row.ratio_to_native_gn32)
    for key, ratios in values.items():
        if key[-1].startswith("native_gn32_again"):
            differences = [abs(r - 1) for r in ratios]
            most = quantiles(differences, n=20)[-1] if len(differences) > 1 else differences[0]
            noise.append(f"{most:.0%} ({', '.join(key[:-1])}{key[-1].removeprefix('native_gn32_again')})")
        else:
            lines.append([*key, geometric_mean(ratios), min(ratios), max(ratios)])
    headers = ["dtype", "layout", "direction", "implementation", "geometric mean", "lowest", "highest"]
    inputs = len({row.input()[:2] for row in rows if not row.implementation.startswith("native_gn32")})
    text = [
        f"Time as a ratio to PyTorch's GN at G = 32 in the same run, over {inputs} inputs:",
        markdown(lines, headers, ".2f"),
    ]
    said = f"The same call a second time differs by less than this in 95 % of the inputs: {'; '.join(noise)}."
    forward = [row for row in rows if row.direction == "forward" and row.after == "nothing"]
    if not forward:
        return "\n\n".join([*text, said])
    native = {row.input(): row.ratio_to_native_gn32 for row in forward if row.implementation == "native"}
    ours = sorted((row for row in forward if row.implementation == "ours"), key=lambda row: -row.ratio_to_native_gn32)
    slowest = [
        [
            "x".join(map(str, row.shape)),
            *row.input()[1:],
            row.milliseconds,
            row.ratio_to_native_gn32,
            native[row.input()],
        ]
        for row in ours[:8]
    ]
    ratios = [row.ratio_to_native_gn32 for row in ours]
    return "\n\n".join(
        [
            *text,
            f"Ours, forward: geometric mean {geometric_mean(ratios):.2f}, highest {max(ratios):.2f}.",
            said,
            "The slowest of ours, forward:",
            markdown(
                slowest, ["input", "G", "dtype", "layout", "ms", "ours / GN-32", "PyTorch's at this G / GN-32"], ".2f"
            ),
        ]
    )


def add_arguments(parser) -> None:
    add_outputs(parser, json="write a row for each input, direction and implementation")
    add_timing(parser, seconds=0.3, images=[1], each="implementation and input")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--layout", nargs="+", default=["contiguous"], choices=["contiguous", "channels_last"])
    parser.add_argument("--after", nargs="+", default=["nothing"], choices=AFTER, help="default: nothing")
    parser.add_argument(
        "--implementations",
        nargs="+",
        metavar="NAME",
        help="only these, as they are called above, beside native and ours, which are always timed; default: all",
    )


def main(args) -> None:
    prepare_outputs(args.json)
    torch.manual_seed(0)
    keep_freed_memory()
    if args.device == "cpu" and not cpu_kernels.is_compiled():
        print("gng_d2 was installed without a C compiler: on the CPU ours is PyTorch's own op")
    rows = rows_to_keep(args, NormCostRow)
    done = {(*row.input(), row.after) for row in rows if row.implementation == "ours"}
    inputs = dict.fromkeys(norm for images in args.images for norm in detector_norms(images, *args.size))
    settings = [(dtype, layout, after) for after in args.after for dtype in args.dtype for layout in args.layout]
    jobs = [(*norm, *setting) for setting in settings for norm in inputs]
    bandwidth = copy_bandwidth(args.device)
    print(f"{machine(args.device)}; a copy moves {bandwidth / 1e9:.1f} GB/s")
    for job in tqdm(jobs, unit="input"):
        if job not in done:
            shape, num_groups, dtype, layout, after = job
            setting = getattr(torch, dtype), layout == "channels_last"
            with set_kernels_enabled("cuda"):  # those for CUDA may be off by default
                rows += norm_rows(
                    shape, num_groups, *setting, args.device, bandwidth, args.seconds, args.implementations, after
                )
            write_rows(args.json, rows)
    print(table(rows))
