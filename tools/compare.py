#!/usr/bin/env python3
"""Train one config under several norms and seeds, all else equal, and compare them.

    tools/compare.py --config-file configs/quick/pfpn_gn.yaml --norms GN GN1 PGN --seeds 0 1 2 --output output/compare
    tools/compare.py --config-file configs/pfpn_gn.yaml --norms GN GN1 PGN --seeds 0 1 2 --output output/table5 \\
        --num-gpus 8

Each run is a job of tools/train_net.py in DIR/NORM/seed_SEED. Started again, the same command goes on where it
was: what finished is not run again, what was interrupted resumes, what failed is tried once more.
"""

import argparse
import sys

import gng_d2  # noqa: F401  makes its norm names known
from gng_d2.compare import Comparison, train_all
from gng_d2.errors import InputError


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a path or a name in Detectron2's model zoo")
    parser.add_argument("--norms", required=True, nargs="+", metavar="NORM", help="differences are taken to the first")
    parser.add_argument("--seeds", required=True, nargs="+", type=int, metavar="SEED", help="0 or more each")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the runs and the report")
    parser.add_argument(
        "--norm-keys", nargs="+", metavar="KEY", help="what to vary; default: each NORM of the model that is GN or ours"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="of each machine; without a GPU, CPU processes; default: 1")
    parser.add_argument("--num-machines", type=int, default=1, help="default: 1; all need DIR in common")
    parser.add_argument("--machine-rank", type=int, default=0, help="of this machine, from 0 on; default: 0")
    parser.add_argument("--dist-url", default="auto", help="of the first machine, tcp://NAME:PORT")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config in all runs")
    return parser.parse_args()


def main(args):
    comparison = Comparison(
        args.config_file,
        args.norms,
        args.seeds,
        args.output,
        args.norm_keys,
        args.opts,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )
    comparison.check()
    train_all(comparison)


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")
