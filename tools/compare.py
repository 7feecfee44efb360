#!/usr/bin/env python3
"""Train one config under several norms and seeds, all else equal, and compare them.

    tools/compare.py --config-file configs/quick/pfpn_gn.yaml --norms GN GN1 PGN --seeds 0 1 2 --output output/compare
    tools/compare.py --config-file configs/pfpn_gn.yaml --norms GN GN1 PGN --seeds 0 1 2 --output output/table5 \\
        --num-gpus 8

Each run is a job of tools/train_net.py in DIR/NORM/seed_SEED. Started again, the same command goes on where it
was: what finished is not run again, what was interrupted resumes, what failed is tried once more. Started
twice at the same time (under two CUDA_VISIBLE_DEVICES), each takes the runs that the other leaves.

The report, results.md, results.json, curves.png and channels_per_group.png in DIR, has for each metric that the model
has (in percent) mean and standard deviation over the seeds, and the paired differences to the first norm with their
95 % intervals.
"""

from command_line import add_import, add_overrides, add_recompute_norms, add_trust, run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a path or a name in the model zoo")
    parser.add_argument("--norms", required=True, nargs="+", metavar="NORM", help="the first is the baseline")
    parser.add_argument("--seeds", required=True, nargs="+", type=int, metavar="SEED", help="0 or more each")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the runs and the report")
    parser.add_argument(
        "--norm-keys", nargs="+", metavar="KEY", help="what to vary; default: each NORM of the model that is GN or ours"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="of each machine; without GPUs, processes; default: 1")
    parser.add_argument("--num-machines", type=int, default=1, help="default: 1; all need DIR in common")
    parser.add_argument("--machine-rank", type=int, default=0, help="of this machine, from 0 on; default: 0")
    parser.add_argument("--dist-url", default="auto", help="of the first machine, tcp://NAME:PORT")
    parser.add_argument("--plan", action="store_true", help="print what would run, and the time by a few iterations")
    add_import(parser)
    add_trust(parser)
    add_recompute_norms(parser)
    add_overrides(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    from gng_d2.errors import InputError
    from study.comparison import Comparison, train_all
    from study.report import plan, write_report

    comparison = Comparison(
        args.config_file,
        args.norms,
        args.seeds,
        args.output,
        args.norm_keys,
        args.opts,
        imports=args.imports,
        recompute_norms=args.recompute_norms,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )
    comparison.check()
    if args.plan and args.num_machines > 1:
        raise InputError("--plan times the iterations of one machine: leave --num-machines away")
    if args.plan:
        print(plan(comparison))
        return
    comparison.claim_output()
    for _ in train_all(comparison):
        if args.machine_rank == 0:
            write_report(comparison)
    if args.machine_rank == 0:
        print(f"\n{write_report(comparison)}\nin {args.output}: results.md, results.json and pictures")
    failed = [run for run in comparison.runs if comparison.state(run).status == "failed"]
    if failed:
        raise InputError(f"{len(failed)} of {len(comparison.runs)} runs failed. The same command tries them once more")


if __name__ == "__main__":
    run_tool(main, if_stopped="the same command goes on where it was")
