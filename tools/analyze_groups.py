#!/usr/bin/env python3
"""Show a model's norms, their groups and the paper's ratio K before it trains. It allocates no weights.

    tools/analyze_groups.py --config-file configs/pfpn_pgn.yaml --plot groups.png
    tools/analyze_groups.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml \\
        MODEL.RESNETS.NORM PGN MODEL.FPN.NORM PGN
    tools/analyze_groups.py --config-file configs/pfpn_pgn.py --ours model.backbone.norm=PGN
"""

from command_line import add_config_file, add_import, add_outputs, add_overrides, add_trust, run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    add_config_file(parser)
    parser.add_argument(
        "--ours",
        action="store_true",
        help="only the group norms that gng_d2 makes from a norm's name, with or without +WS",
    )
    add_outputs(
        parser,
        json="write the table as a list of objects",
        plot="draw group counts along the depth, and K for GN, GN1 and PGN",
    )
    add_import(parser)
    add_trust(parser)
    add_overrides(parser, lazy=True)
    return parser.parse_args()


def main():
    args = parse_args()
    from dataclasses import asdict

    from gng_d2.errors import InputError
    from gng_d2.job.build import bind_remaining_norms, build, build_on_meta
    from gng_d2.job.config import load_any_config
    from gng_d2.job.files import prepare_outputs, write_json
    from gng_d2.job.imports import import_modules
    from gng_d2.job.norm_keys import check_norm_keys
    from gng_d2.layers import unbound_norms
    from gng_d2.layers.norm_names import norm_from_name
    from gng_d2.models.norm_table import NormTable, norm_summary, norm_table
    from gng_d2.predict.pictures import plot_groups

    import_modules(args.imports)
    cfg = load_any_config(args.config_file, args.opts)
    prepare_outputs(args.json, args.plot)
    model = build_on_meta(cfg)
    check_norm_keys(cfg, model)
    if unbound_norms(model):  # only a run shows which layers they follow, and it takes weights
        model = bind_remaining_norms(build(cfg))
    unbound = unbound_norms(model)
    table = norm_table(model)
    if not table:
        raise InputError(f"config file {args.config_file}: its model has no norms")
    if args.ours:
        table = NormTable(row for row in table if norm_from_name(row.norm))
    if not table:
        raise InputError(f"--ours: none of the model's norms is one of ours. It has {norm_summary(model)}")
    print(f"{table}\n\n{norm_summary(model)}")
    if args.json:
        write_json(args.json, [asdict(row) for row in table])
    if args.plot:
        plot_groups(table, args.plot)
    if unbound:
        raise InputError(f"{', '.join(unbound)}: the groups are not known, because no weight layer stands before them")


if __name__ == "__main__":
    run_tool(main)
