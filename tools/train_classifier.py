#!/usr/bin/env python3
"""Table 4 of the paper: Detectron2's ResNet-50 and -101 as image classifiers under GN, GN1 and PGN.

    tools/train_classifier.py --data caltech101 --json caltech101.json
    tools/train_classifier.py --dataset oxford-iiit-pet --data datasets --depth 101
    tools/train_classifier.py --data caltech101 --weights R-50-GN.pkl --epochs 30

For a seed, the initial weights, the order of the images and their augmentation are the same for every norm. On a
GPU it trains in mixed precision. Can be stopped at any time: the same command goes on where it was.
"""

import argparse
import logging
import os
import sys

import torch
from detectron2.layers import get_norm
from tabulate import tabulate
from tqdm import tqdm

import study.classifier
from gng_d2.errors import InputError
from gng_d2.files import check_outputs, machine, write_rows
from gng_d2.norm_names import norm_in_path
from study.classifier import PET, load_images, num_iterations, train
from study.paper import TABLE_4
from study.rows import finish_run, mean_and_std, open_run


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=study.classifier.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        default="caltech-101",
        metavar="NAME",
        help=f"{PET}, or what to call the folders of classes in ROOT; default: %(default)s",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="ROOT",
        help=f"folder with a folder of images for each class; {PET} is downloaded to it if missing",
    )
    parser.add_argument(
        "--classes", type=int, metavar="N", help="only the N classes with the fewest images; default: all"
    )
    parser.add_argument("--depth", type=int, default=50, choices=(50, 101), help="of the ResNet; default: %(default)s")
    parser.add_argument(
        "--norms",
        nargs="+",
        default=["GN", "GN1", "PGN"],
        metavar="NORM",
        help="names that a config's NORM may have; default: GN GN1 PGN",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument(
        "--weights",
        default="",
        metavar="FILE.pkl",
        help="of tools/convert_weights.py, to start from; default: from scratch",
    )
    parser.add_argument("--epochs", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=128, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, metavar="IMAGES", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=0.005, help="learning rate; default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that load images; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        default="output/classifier",
        metavar="DIR",
        help="a folder for each run, with its checkpoints, goes here; default: %(default)s",
    )
    parser.add_argument("--json", metavar="OUT", help="write a row for each run")
    return parser.parse_args()


def main(args):
    check_outputs(args.json)
    for norm in args.norms:
        get_norm(norm, 64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = load_images(args.dataset, args.data, args.classes)
    common = {
        "dataset": args.dataset,
        "classes": len(images.classes),
        "train_images": len(images.train),
        "test_images": len(images.test),
        "depth": args.depth,
        "weights": os.path.basename(args.weights),
        "epochs": args.epochs,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "amp": device == "cuda",
    }
    runs = [{"norm": norm, "seed": seed, **common} for seed in args.seeds for norm in args.norms]
    names = [f"{args.dataset}-R{args.depth}-{norm_in_path(run['norm'])}-seed{run['seed']}" for run in runs]
    folders = [os.path.join(args.output, name) for name in names]
    logging.getLogger("detectron2.engine.train_loop").disabled = True  # it prints tracebacks of what is raised anyway
    jobs = [(run, folder) for run, folder in zip(runs, folders) if open_run(folder, run) is None]
    with tqdm(total=sum(num_iterations(run) for run, _ in jobs), unit="step", disable=not jobs) as bar:
        for run, folder in jobs:
            bar.set_description(f"{run['norm']}, seed {run['seed']}")
            error = train(
                run, images, folder, weights=args.weights, device=device, workers=args.workers, on_step=bar.update
            )
            finish_run(folder, {**run, "error": error, "machine": machine(device)})
    rows = [open_run(folder, run) for run, folder in zip(runs, folders)]
    if args.json:
        write_rows(args.json, rows)
    print_table(args, rows)


def print_table(args, rows):
    # a part of the classes is another task than the paper's
    paper = TABLE_4.get((args.dataset, args.depth), {}) if args.classes is None else {}
    table = []
    for norm in args.norms:
        mean, std = mean_and_std([row["error"] for row in rows if row["norm"] == norm])
        table.append([norm, paper.get(norm), mean, std, len(args.seeds)])
    headers = ["norm", "paper, error %", "ours, error %", "std over seeds", "seeds"]
    print(tabulate(table, headers, floatfmt=".3f", missingval="-"))
    print(
        "ours: {dataset}, {classes} classes, {train_images} training and {test_images} test images of {image_size} "
        "pixels, R-{depth}, {epochs} epochs".format(**rows[0])
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on where it was")
