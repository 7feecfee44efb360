#!/usr/bin/env python3
"""Time a whole training step of two detectors under FrozenBN, GN, GN+WS, PGN and PGN+WS: Faster R-CNN, Panoptic FPN.

    tools/benchmark_train.py --json out.json
    tools/benchmark_train.py --models pfpn --images 2 --precision float32 amp

Forward, backward and optimizer, on noise with eight objects an image; the norm is in backbone, FPN and semantic head,
all layers are trained. The five models of a table run in turn, in one run: medians, to be read as ratios. Peak memory
is a model's own, on CUDA alone. The share of weight standardization is its time, alone, over that of the step.
"""

import argparse
import sys

import torch
from tabulate import tabulate
from tqdm import tqdm

import gng_d2  # noqa: F401  makes its norm names known
from gng_d2.errors import InputError
from gng_d2.files import check_outputs, machine, write_rows
from study.norm_cost import keep_freed_memory
from study.step_cost import MODELS, step_rows


def parse_args():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="OUT", help="write all rows")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: both")
    parser.add_argument(
        "--images", type=int, nargs="+", default=[1, 2] if cuda else [1], help="images in a batch; default: 1 2 on CUDA"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=[800, 1216], metavar=("HEIGHT", "WIDTH"), help="default: 800 1216"
    )
    parser.add_argument(
        "--precision", nargs="+", default=["float32", "amp"] if cuda else ["float32"], choices=["float32", "amp"],
        help="amp is float16 under autocast, on CUDA; default: both on CUDA",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model, at least three steps; default: 10")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the configs")
    return parser.parse_args()


def main(args):
    check_outputs(args.json)
    if args.device == "cpu" and "amp" in args.precision:
        raise InputError("--precision amp: Detectron2's AMP needs CUDA")
    keep_freed_memory()
    jobs = [(m, p == "amp", i) for m in args.models for p in args.precision for i in args.images]
    rows = []
    for job in tqdm(jobs, unit="table"):
        rows += step_rows(*job, *args.size, args.device, args.seconds, args.opts)
    rows = [{**row, "machine": machine(args.device)} for row in rows]
    if args.json:
        write_rows(args.json, rows)
    print(machine(args.device))
    hidden = ("machine", "size")
    print(
        tabulate(
            [{k: v for k, v in row.items() if k not in hidden} for row in rows],
            headers="keys",
            floatfmt=".3f",
            missingval="not measured",
        )
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
