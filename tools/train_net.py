#!/usr/bin/env python3
"""Train or evaluate a Detectron2 model whose norms may be PGN or GN<k>.

    tools/train_net.py --config-file configs/quick/pfpn_pgn.yaml
    tools/train_net.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus 8 \\
        MODEL.RESNETS.NORM PGN MODEL.FPN.NORM PGN MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0

--config-file takes a path or a name in Detectron2's model zoo. On a machine without a GPU, --num-gpus
counts CPU processes. Datasets are looked for in $DETECTRON2_DATASETS (default: ./datasets).
"""

import sys

from detectron2.engine import default_argument_parser

import gng_d2  # noqa: F401  makes its norm names known
from gng_d2.engine import run_job
from gng_d2.errors import InputError
from gng_d2.imports import add_import_argument
from gng_d2.weight_files import add_trust_argument

if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    add_import_argument(parser)
    add_trust_argument(parser)
    args = parser.parse_args()
    try:
        run_job(args)
    except InputError as error:
        sys.exit(f"error: {error}")
