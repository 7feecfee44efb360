#!/usr/bin/env python3
"""Show a model's norms, their groups and the paper's K before it trains. Allocates no weights.

    tools/analyze_groups.py --config-file configs/pfpn_pgn.yaml --plot groups.png
    tools/analyze_groups.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml \\
        MODEL.RESNETS.NORM PGN MODEL.FPN.NORM PGN
"""

import argparse
import json
import sys
from dataclasses import asdict

from tabulate import tabulate

import gng_d2  # noqa: F401  makes its norm names known
from gng_d2.analysis import build_on_meta, norm_table
from gng_d2.config import check_config, load_config
from gng_d2.errors import InputError
from gng_d2.imports import add_import_argument, import_modules
from gng_d2.visualize import plot_groups


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a path or a name in Detectron2's model zoo"
    )
    parser.add_argument("--json", metavar="OUT", help="write the table as a list of objects")
    parser.add_argument(
        "--plot", metavar="OUT.png", help="draw group counts along the depth, and K for GN, GN1 and PGN"
    )
    add_import_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")
    return parser.parse_args()


def main(args):
    import_modules(args.imports)
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    rows = [asdict(row) for row in norm_table(build_on_meta(cfg))]
    if not rows:
        raise InputError(f"config file {args.config_file}: its model has no norms")
    headers = {"num_groups": "groups", "ideal_num_groups": "ideal", "isometry_ratio": "K", "weight_standardized": "WS"}
    print(tabulate([{headers.get(k, k): v for k, v in row.items()} for row in rows], headers="keys", missingval="-"))
    unbound = [row["name"] for row in rows if row["norm"].startswith("PGN") and row["num_groups"] is None]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    if args.plot:
        plot_groups(rows, args.plot)
    if unbound:
        raise InputError(f"{', '.join(unbound)}: PGN that met no weight layer, so its groups are not known")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
