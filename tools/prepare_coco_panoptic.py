#!/usr/bin/env python3
"""Make semantic maps from panoptic PNGs in COCO's format. Detectron2 needs both for a panoptic dataset.

    tools/prepare_coco_panoptic.py
    tools/prepare_coco_panoptic.py --json my/panoptic.json --panoptic-root my/panoptic --output my/semantic

Without arguments it makes those of COCO 2017 in $DETECTRON2_DATASETS/coco (default: ./datasets/coco): it reads
panoptic_train2017 and annotations/panoptic_train2017.json, writes to panoptic_stuff_train2017, and does the same for
val2017. If it is stopped, the same command goes on where it was.
"""

from command_line import run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    parser.add_argument("--json", metavar="FILE", help="panoptic JSON of another dataset, in COCO's format")
    parser.add_argument("--panoptic-root", metavar="DIR", help="folder of its panoptic PNGs")
    parser.add_argument("--output", metavar="DIR", help="folder for its semantic maps, Detectron2's sem_seg_root")
    args = parser.parse_args()
    if len({args.json is None, args.panoptic_root is None, args.output is None}) > 1:
        parser.error("--json, --panoptic-root and --output go together")
    return args


def main():
    args = parse_args()
    from gng_d2.job.data.coco_format import split_files
    from gng_d2.job.data.embedded import datasets_root
    from gng_d2.job.data.semantic import make_semantic_maps

    if args.json is not None:
        datasets = [(args.json, args.panoptic_root, args.output)]
    else:
        splits = [split_files(datasets_root() / "coco", split) for split in ("train2017", "val2017")]
        datasets = [tuple(str(f[k]) for k in ("panoptic_json", "panoptic_root", "sem_seg_root")) for f in splits]
    for dataset in datasets:
        print(f"{make_semantic_maps(*dataset)} new maps in {dataset[-1]}")


if __name__ == "__main__":
    run_tool(main, if_stopped="the same command goes on where it was")
