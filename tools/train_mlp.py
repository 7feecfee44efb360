#!/usr/bin/env python3
"""Table 3 and Figure 2 of the paper: an MLP on MNIST under every number of groups.

    tools/train_mlp.py --data datasets --processes 2 --json mlp.json --plot mlp.png

784-512-10 with group norm and ReLU, G = 1, 2, ..., 512. For a seed, the initial weights and the order of the
images are the same for every G. Can be stopped at any time: the same command goes on with the runs that are not
finished.
"""

import argparse
import sys

from tabulate import tabulate

import study.mlp
from gng_d2.errors import InputError
from gng_d2.files import check_outputs, write_rows
from study.mlp import PRACTICAL, settings_of, train_all
from study.paper import TABLE_3
from study.plots import plot_learning_curves
from study.rows import mean_and_std


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=study.mlp.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default="datasets",
        metavar="ROOT",
        help="folder that has MNIST/raw, or that it is downloaded to; default: %(default)s",
    )
    parser.add_argument(
        "--groups",
        type=int,
        nargs="+",
        default=list(TABLE_3),
        choices=list(TABLE_3),
        metavar="G",
        help="numbers of groups, powers of 2; default: 1 2 4 ... 512",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, each on one CPU thread; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        default="output/mlp_mnist",
        metavar="DIR",
        help="a folder for each run goes here; default: %(default)s",
    )
    parser.add_argument("--json", metavar="OUT", help="write a row for each run, with its learning curve")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the learning curves, the mean over the seeds")
    return parser.parse_args()


def main(args):
    check_outputs(args.json, args.plot)
    runs = [settings_of(groups, seed, args.epochs) for seed in args.seeds for groups in args.groups]
    rows = train_all(runs, args.data, args.output, args.processes)
    if args.json:
        write_rows(args.json, rows)
    if args.plot:
        plot_learning_curves(rows, PRACTICAL, args.plot)
    table = []
    for groups in args.groups:
        mean, std = mean_and_std([row["test_error"] for row in rows if row["num_groups"] == groups])
        table.append([f"{groups}{'*' * (groups == PRACTICAL)}", TABLE_3[groups], mean, std, len(args.seeds)])
    headers = ["G", "paper, error %", "ours, error %", "std over seeds", "seeds"]
    print(tabulate(table, headers, floatfmt=".3f", missingval="-", colalign=["right"]))
    print("* the practical number of groups")


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on with the runs that are not finished")
