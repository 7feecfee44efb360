#!/usr/bin/env python3
"""Measure the paper's theory again: Tables 1 and 2, and where Eq. 22 holds.

    tools/validate_theory.py table1 --json table1.json
    tools/validate_theory.py table2
    tools/validate_theory.py sweep --plot sweep.png

table1  Equations A to D for the paper's four blocks. An experiment draws the weights of two blocks, and 64 inputs
        that share them, each with loss weights of its own. Variances are of the whole population, a ratio is one
        of averages. low, high: for A and C the mean -/+ 1.96 standard errors. B and D have no finite variance at 4
        features a group: the median of 20 repeats, each a ratio of averages, and their 5 % and 95 % quantiles.
table2  Forward and backward gains of eleven activations by quadrature, beside the paper's from 10^7 samples.
sweep   B (Eq. 22) and D (K, Eq. 31) over group sizes, of a fully connected layer and of 3x3 convolutions on maps
        of 4x4, 8x8 and 16x16, 256 -> 128 features. exact: (n_g - 2) / (n_g - 3) in B, fully connected layers only.
"""

import argparse
import sys

from tabulate import tabulate

from gng_d2.errors import InputError
from gng_d2.files import check_outputs, machine, write_rows
from study.plots import plot_sweep
from study.theory import sweep, table_1, table_2
from study.unit_block import REPEATS


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{table1,table2,sweep}")
    for name, experiments in (("table1", 2000), ("table2", None), ("sweep", 100)):
        command = commands.add_parser(name)
        command.add_argument("--json", metavar="OUT", help="write the rows as a list of objects")
        if experiments:
            command.add_argument(
                "--experiments",
                type=int,
                default=experiments,
                metavar="N",
                help=f"draws of the weights for each block, at least {REPEATS} (default: %(default)s, a few minutes)",
            )
            command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        if name == "sweep":
            command.add_argument("--plot", metavar="OUT.png", help="draw paper, exact and measured over the group size")
    return parser.parse_args()


_TABLE_1_NOTE = f"""
A, C: mean and 95 % interval. B, D: the variance is infinite at 4 features a group, so median of means, and the 5 %
and 95 % quantiles of {REPEATS} repeats. Variances are about the mean of all samples; about each sample's own mean, as
the paper takes them, A is n_out (1 - (2 - 1/pi) / n_in): 511.16, 255.16, 127.16, 63.16."""


def main(args):
    plot = getattr(args, "plot", None)
    check_outputs(args.json, plot)
    if args.command == "table2":
        rows = table_2()
    elif args.experiments < REPEATS:
        raise InputError(f"--experiments {args.experiments}: at least {REPEATS}, one for each repeat")
    else:
        rows = (table_1 if args.command == "table1" else sweep)(args.experiments, args.seed)
    print(tabulate(rows, headers="keys", floatfmt=".3f", missingval="-"))
    if args.command == "table1":
        print(_TABLE_1_NOTE)
    if args.json:
        write_rows(args.json, [{**row, "machine": machine()} for row in rows])
    if plot:
        plot_sweep(rows, plot)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
