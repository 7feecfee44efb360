#!/usr/bin/env python3
"""Time group norm over every distinct norm of Faster R-CNN R-50-FPN GN+WS and of Panoptic FPN's semantic head.

    tools/benchmark_norm.py --json out.json
    tools/benchmark_norm.py --images 1 2 --dtype float32 bfloat16 --layout contiguous channels_last

All implementations run in turn, in one run: times are medians, to be read as ratios. Each norm has the groups that
PGN gives it; `native` is PyTorch's op at the same groups, `native_gn32` at 32. `frozen_bn` is the affine map of each
channel alone. On CUDA the cache is flushed before each call, and `ours_always` and the compiled forms of PyTorch's op
are timed too; on a CPU each call follows one of itself. Other packages (Liger-Kernel, apex, SGLang's,
which adds a SiLU and has no backward) are timed where they are installed.

A row's fraction_of_copy_bandwidth counts one pass over the tensor for each time that group norm must read or write
the data of a tensor larger than the caches: 3 forward (moments, read, write), 8 with the backward (sums: 2,
gradient: 3).

On CUDA the time of small inputs is that of the host which launches. On a CPU the C library is told to keep
memory that is freed, as CUDA's allocator does; otherwise page faults take most of the time of large inputs,
whatever the norm.
"""

import argparse
import os
import sys
from statistics import geometric_mean, quantiles

import torch
from tabulate import tabulate
from tqdm import tqdm

import gng_d2  # noqa: F401  makes its norm names known
from gng_d2.config import load_config
from gng_d2.errors import InputError
from gng_d2.files import check_outputs, machine, write_rows
from gng_d2.ops import cpu_kernels
from study.norm_cost import copy_bandwidth, keep_freed_memory, norm_inputs, norm_rows

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="OUT", help="write all rows")
    parser.add_argument("--images", type=int, nargs="+", default=[1], help="images in a batch; default: 1")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[800, 1216], metavar=("HEIGHT", "WIDTH"), help="default: 800 1216"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--layout", nargs="+", default=["contiguous"], choices=["contiguous", "channels_last"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each implementation and input; default: 0.3")
    return parser.parse_args()


def measure(args):
    torch.manual_seed(0)
    keep_freed_memory()
    if args.device == "cpu" and not cpu_kernels.is_compiled():
        print("gng_d2 was installed without a C compiler: on the CPU ours is PyTorch's own op")
    bandwidth = copy_bandwidth(args.device)
    print(f"{machine(args.device)}; a copy moves {bandwidth / 1e9:.1f} GB/s")
    inputs = []
    for images in args.images:
        for config in ("faster_rcnn_pgn_ws.yaml", "pfpn_pgn.yaml"):
            cfg = load_config(os.path.join(CONFIGS, config))
            inputs += [i for i in norm_inputs(cfg, images, *args.size) if i not in inputs]
    settings = [(getattr(torch, dtype), layout == "channels_last") for dtype in args.dtype for layout in args.layout]
    jobs = [(*shape, *setting) for setting in settings for shape in inputs]
    rows = []
    for job in tqdm(jobs, unit="input"):
        rows += [
            {**row, "machine": machine(args.device)} for row in norm_rows(*job, args.device, bandwidth, args.seconds)
        ]
    return rows


def report(rows):
    for key in dict.fromkeys((row["dtype"], row["layout"], row["direction"]) for row in rows):
        of_key = [row for row in rows if (row["dtype"], row["layout"], row["direction"]) == key]
        print("\n" + ", ".join(key) + ": time as a ratio to native_gn32's")
        ratios = {}
        for row in of_key:
            ratios.setdefault(row["implementation"], []).append(row["ratio_to_native_gn32"])
        noise = quantiles([abs(r - 1) for r in ratios.pop("native_gn32_again")], n=20)[-1]
        table = [
            {"implementation": name, "geometric mean": geometric_mean(r), "lowest": min(r), "highest": max(r)}
            for name, r in ratios.items()
        ]
        print(tabulate(table, headers="keys", floatfmt=".2f"))
        print(f"noise of this run: the same call a second time differs by less than {noise:.0%} in 95 % of the inputs")
        ours = sorted((r for r in of_key if r["implementation"] == "ours"), key=lambda r: -r["ratio_to_native_gn32"])
        slowest = [{k: r[k] for k in ("shape", "num_groups", "milliseconds", "ratio_to_native_gn32")} for r in ours[:5]]
        print("slowest of ours:\n" + tabulate(slowest, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    args = parse_args()
    try:
        check_outputs(args.json)
        rows = measure(args)
        if args.json:
            write_rows(args.json, rows)
        report(rows)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
