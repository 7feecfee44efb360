#!/usr/bin/env python3
"""Measure how each block of a model changes the variance of the gradient, beside the paper's K.

    tools/probe_isometry.py --config-file configs/faster_rcnn_pgn_ws.yaml --plot isometry.png \\
        MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0 INPUT.MIN_SIZE_TRAIN '(320,)'
    tools/probe_isometry.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --json isometry.json \\
        MODEL.RESNETS.NORM PGN MODEL.FPN.NORM PGN MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0

One batch of DATASETS.TRAIN (looked for in $DETECTRON2_DATASETS), the model's own loss, one backward for each of:
the model as configured, and the same weights with the groups of GN (32), GN1 and PGN. A block is a convolution, its
norm, and the activation that follows at once, if one does. Weights are MODEL.WEIGHTS, or the initialization where
that is ''.

measured  Var[dL/dx] / Var[dL/dx'] from the block's input x to its output x', through this block alone, with the
          gradient that the loss gave its output
K         the paper's, which supposes stride 1, ReLU before and after, and an input that feeds nothing else. A
          stride of s divides the measured ratio by about s^2; fan_out counts what the block's input feeds
"""

import argparse
import sys

from detectron2.modeling import build_model
from tabulate import tabulate

import gng_d2  # noqa: F401  makes its norm names known
from gng_d2.checkpoint import Checkpointer
from gng_d2.config import check_config, check_weights, load_config
from gng_d2.data.checks import prepare_datasets
from gng_d2.data.loader import build_train_loader, seed_everything
from gng_d2.errors import InputError
from gng_d2.files import check_outputs, machine, write_rows
from gng_d2.imports import add_import_argument, import_modules
from study.gradients import probe
from study.plots import plot_probe


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a path, or a name in Detectron2's zoo")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="images of the batch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and proposals (default: %(default)s)")
    parser.add_argument("--json", metavar="OUT", help="write the rows as a list of objects")
    parser.add_argument("--plot", metavar="OUT.png", help="draw measured and K along the depth, a panel for each setup")
    add_import_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")
    return parser.parse_args()


def print_rows(rows):
    """A line for each block, with a column for each setup."""
    lines = {}
    for row in rows:
        line = {key: row[key] for key in ("name", "n_in", "n_out", "kernel_size", "stride", "fan_out", "activation")}
        ratios = [f"{row[key]:.3f}" if row[key] is not None else "-" for key in ("measured", "paper")]
        cell = f"{row['num_groups'] or '-'}: {ratios[0]} ({ratios[1]})"
        lines.setdefault(row["name"], line)[row["setup"]] = cell
    headers = {"name": "norm", "kernel_size": "kernel", "fan_out": "fan-out"}
    table = [{headers.get(key, key): value for key, value in line.items()} for line in lines.values()]
    print(tabulate(table, headers="keys", missingval="-"))
    print("\nunder each setup: groups: measured (K)")
    for setup in dict.fromkeys(row["setup"] for row in rows):
        skipped = sorted(lines.keys() - {row["name"] for row in rows if row["setup"] == setup})
        if skipped:
            print(f"{setup}: no figure for {', '.join(skipped)}: no group norm, or its channels do not divide")


def main(args):
    if args.images < 1 or args.seed < 0:
        raise InputError(f"--images {args.images} --seed {args.seed}: at least one image, and a seed of 0 or more")
    import_modules(args.imports)
    cfg = load_config(args.config_file, args.opts)
    cfg.merge_from_list(["DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", args.images, "SOLVER.REFERENCE_WORLD_SIZE", 0, "SEED", args.seed])
    check_config(cfg)
    check_weights(cfg)
    prepare_datasets(cfg)
    check_outputs(args.json, args.plot)
    seed_everything(args.seed)
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    rows = probe(model, next(iter(build_train_loader(cfg))), args.seed)
    print_rows(rows)
    if args.json:
        write_rows(args.json, [{**row, "machine": machine(cfg.MODEL.DEVICE)} for row in rows])
    if args.plot:
        plot_probe(rows, args.plot)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
