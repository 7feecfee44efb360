#!/usr/bin/env python3
"""Train one config under several norms and seeds, all else equal, and compare them.

    tools/compare.py --config-file configs/quick/pfpn_gn.yaml --norms GN GN1 PGN --seeds 0 1 2 --output output/compare
    tools/compare.py --config-file configs/pfpn_gn.yaml --norms GN GN1 PGN --seeds 0 1 2 --output output/table5 \\
        --num-gpus 8 --cluster slurm --slurm-partition gpu --parallel 3

Each run is a job of tools/train_net.py in DIR/NORM/seed_SEED. Started again, the same command goes on where it
was: finished runs stay, interrupted ones resume, failed ones are tried once more. Keys that change nothing in a
training, such as SOLVER.CHECKPOINT_PERIOD and DATALOADER.NUM_WORKERS, may be others then. Two such commands at the same
time on one machine share the runs between them. A run is finished when its metrics are whole. If its model_final.pth
is damaged later, the report stays as it is, and predict.py or --eval-only refuse the file. Where DIR is lost,
--finished results.json goes on from the results alone, with more norms and seeds too.

With --cluster slurm each run is a job of Slurm, in a checkout and a DIR that all machines see. The jobs go on when
this command ends. The same command watches them again, and submits the runs that have no job. Ctrl-C asks whether to
cancel the jobs.

The report is in DIR: results.md, results.json, curves.png and channels_per_group.png. For each metric (PQ, the AP
of boxes, masks and keypoints, mIoU, on each test set; in percent) it has mean and standard deviation over the seeds,
and the differences to the first norm, seed by seed, with their 95 % intervals.
"""

from command_line import add_import, add_norm_options, add_overrides, add_trust, count, run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a path or a name in the model zoo")
    parser.add_argument("--norms", required=True, nargs="+", metavar="NORM", help="the first is the baseline")
    parser.add_argument("--seeds", required=True, nargs="+", type=int, metavar="SEED", help="0 or more each")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the runs and the report")
    parser.add_argument(
        "--norm-keys",
        nargs="+",
        metavar="KEY",
        help="what to vary; default: each NORM key that is GN or a norm of ours. A key that has +WS keeps it",
    )
    parser.add_argument(
        "--num-gpus",
        type=count,
        default=1,
        metavar="N",
        help="GPUs of each machine, or processes where there are no GPUs; default: 1",
    )
    parser.add_argument(
        "--num-machines",
        type=count,
        default=1,
        metavar="N",
        help="machines for each run, which must share DIR; default: 1",
    )
    parser.add_argument(
        "--finished",
        metavar="FILE.json",
        help="results.json of the same comparison from another machine, or from a folder that is lost: the runs that "
        "it has results of are not trained again",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what would run, and for how long, by timing a few iterations"
    )
    parser.add_argument(
        "--cluster", choices=["local", "slurm"], default="local", help="where runs are trained; default: this machine"
    )
    parser.add_argument(
        "--parallel",
        type=count,
        default=1,
        metavar="N",
        help="runs at a time; on one machine they share its GPUs or threads; default: 1",
    )
    _add_local(parser.add_argument_group("--cluster local"))
    _add_slurm(parser.add_argument_group("--cluster slurm (needs submitit)"))
    add_import(parser)
    add_trust(parser)
    add_norm_options(parser)
    add_overrides(parser)
    return parser.parse_args()


def _add_local(group):
    group.add_argument("--machine-rank", type=int, default=0, help="the number of this machine, from 0 on; default: 0")
    group.add_argument("--dist-url", default="auto", help="address of the first machine, tcp://NAME:PORT")


def _add_slurm(group):
    group.add_argument("--slurm-partition", metavar="NAME", help="default: the cluster's")
    group.add_argument("--slurm-account", metavar="NAME", help="default: the user's")
    group.add_argument(
        "--slurm-time",
        type=count,
        metavar="MIN",
        help="time limit of a job; a run that needs longer is requeued and goes on; default: 1440",
    )
    group.add_argument(
        "--slurm-cpus",
        type=count,
        metavar="N",
        help="CPUs of each machine; default: one for each process and data-loader worker",
    )
    group.add_argument(
        "--slurm-option",
        action="append",
        metavar="NAME=VALUE",
        help="one more option of sbatch; repeat the flag for several: --slurm-option constraint=a100 "
        "--slurm-option exclusive. Unless gres or gpus-... is among them, a job asks for --num-gpus GPUs of each "
        "machine, or for none with MODEL.DEVICE cpu",
    )


def cluster_of(args, comparison):
    """Where the runs are trained."""
    from gng_d2.errors import InputError
    from study.local import Local
    from study.slurm import Slurm

    slurm = {name: value for name, value in vars(args).items() if name.startswith("slurm_") and value is not None}
    if args.cluster == "local":
        if slurm:
            raise InputError(f"--{min(slurm).replace('_', '-')} is for --cluster slurm")
        return Local(comparison, args.parallel, args.machine_rank, args.dist_url)
    if args.machine_rank or args.dist_url != "auto":
        raise InputError("--machine-rank, --dist-url: Slurm gives each machine its own")
    options = [option.partition("=") for option in slurm.pop("slurm_option", ())]
    parameters = {name.lstrip("-"): value if equals else True for name, equals, value in options}
    minutes, cpus = slurm.pop("slurm_time", 1440), slurm.pop("slurm_cpus", None)
    parameters.update({name.removeprefix("slurm_"): value for name, value in slurm.items()})
    return Slurm(comparison, args.parallel, minutes, cpus, parameters)


def main():
    args = parse_args()
    from gng_d2.errors import InputError
    from study.comparison import Comparison
    from study.plan import plan
    from study.report import restore_runs, write_report
    from study.watch import train_all

    comparison = Comparison(
        args.config_file,
        args.norms,
        args.seeds,
        args.output,
        args.norm_keys,
        args.opts,
        imports=args.imports,
        recompute_norms=args.recompute_norms,
        fuse_norms=args.fuse_norms,
        calibrate_norms=args.calibrate_norms,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
    )
    comparison.check_output()
    comparison.check()
    if args.plan and (args.num_machines > 1 or args.cluster == "slurm"):
        raise InputError("--plan times iterations on this machine: leave out --num-machines and --cluster")
    if args.finished:
        comparison.claim_output()
        restore_runs(comparison, args.finished)
    if args.plan:
        print(plan(comparison, args.parallel))
        return
    cluster = cluster_of(args, comparison)
    comparison.claim_output()
    with cluster:
        for _ in train_all(cluster):
            if args.machine_rank == 0:
                write_report(comparison)
        failed = {run: state for run, state in cluster.states().items() if state.status == "failed"}
    if args.machine_rank == 0:
        print(f"\n{write_report(comparison, failed)}\nin {args.output}: results.md, results.json and pictures")
    if failed:
        raise InputError(f"{len(failed)} of {len(comparison.runs)} runs failed. The same command tries them once more")


if __name__ == "__main__":
    run_tool(main, if_stopped="the same command goes on where it was")
