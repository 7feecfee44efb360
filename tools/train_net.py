#!/usr/bin/env python3
"""Train or evaluate a Detectron2 model. Its NORM keys take PGN, GN1, GN/16 and the like.

    tools/train_net.py --config-file configs/quick/pfpn_pgn.yaml
    tools/train_net.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus 8 \\
        MODEL.RESNETS.NORM PGN MODEL.FPN.NORM PGN MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0

--config-file takes a path or a name in Detectron2's model zoo. On a machine without a GPU, --num-gpus
is the number of CPU processes. Datasets are looked for in $DETECTRON2_DATASETS (default: ./datasets).
"""

from command_line import add_import, add_norm_options, add_trust, check_overrides, run_tool


def main():
    from detectron2.engine import default_argument_parser

    from gng_d2.job.engine import run_job

    parser = default_argument_parser(epilog=__doc__)
    add_import(parser)
    add_trust(parser)
    add_norm_options(parser)
    args = parser.parse_args()
    check_overrides(args.opts)
    run_job(args)


if __name__ == "__main__":
    run_tool(main, if_stopped="with --resume the same command goes on from the last checkpoint")
