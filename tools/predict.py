#!/usr/bin/env python3
"""Predict on image files: pictures, and results in COCO's formats.

    tools/predict.py --config-file configs/quick/pfpn_pgn.yaml --weights output/quick_pfpn_pgn/model_final.pth \\
        --input photo.jpg folder 'more/**/*.png' --output predictions --json predictions/results.json

--json OUT.json writes
    OUT.json                          instances (boxes, scores, classes, masks) as COCO results. pycocotools reads
                                      them by COCO("OUT_images.json").loadRes("OUT.json"). From a semantic model it
                                      has a mask for each class
    OUT_images.json                   the images with their sizes and ids, and the categories. Images of the config's
                                      test dataset keep their ids, others are numbered
    OUT_panoptic.json, OUT_panoptic/  the results of a panoptic model, which panopticapi reads

A file that cannot be read as an image is named and skipped, and the exit status is then 1. Images are turned as their
EXIF orientation says, and pictures and results are turned with them.
For videos and webcams use demo/demo.py of Detectron2 with `import gng_d2` in it.
"""

import os
import sys

from command_line import add_config_file, add_import, add_overrides, add_trust, count, run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    add_config_file(parser)
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint of that config's model")
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="IMG|FOLDER|GLOB",
        help="images; a folder stands for the files in it, 'FOLDER/**/*' for those in its subfolders too. Give another "
        "option after it, not KEY VALUE",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the pictures, which are named as the images"
    )
    parser.add_argument("--json", metavar="OUT.json", help="write the results in COCO's formats")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="leave out instances with a lower score; default: the config's threshold in --json, and 0.5 in pictures",
    )
    parser.add_argument(
        "--batch-size", type=count, default=1, metavar="N", help="run N images of one size together; default: 1"
    )
    add_import(parser)
    add_trust(parser)
    add_overrides(parser, lazy=True)
    return parser.parse_args()


def main():
    args = parse_args()
    from gng_d2.errors import InputError
    from gng_d2.job.build import build
    from gng_d2.job.checkpoint import load_model
    from gng_d2.job.config import check_weight_file, load_any_config
    from gng_d2.job.files import prepare_folder, prepare_outputs
    from gng_d2.job.imports import import_modules
    from gng_d2.predict.coco_results import CocoResults, class_metadata, image_ids
    from gng_d2.predict.predictions import output_names, set_threshold
    from gng_d2.predict.settings import check_test_classes, prediction_settings

    check_numbers(args)
    import_modules(args.imports)
    cfg = load_any_config(args.config_file, args.opts)
    settings = prediction_settings(cfg)
    check_weight_file(args.weights, "--weights")
    paths, without = find_inputs(args.input, cfg)
    names = output_names(paths)
    metadata, records = class_metadata(settings, with_records=args.json is not None)
    check_test_classes(cfg, settings)
    results = CocoResults(args.json, metadata) if args.json else None
    check_inputs_stay(args.output, results, names)
    prepare_folder(args.output, f"--output {args.output}")
    prepare_outputs(args.json)
    model = load_model(build(cfg), args.weights)
    if args.threshold is not None:
        set_threshold(model, args.threshold)

    for given, reason in without.items():
        print(f"skipped: --input {given}: {reason}", file=sys.stderr)
    try:
        skipped = write_predictions(
            args, settings, model, metadata, names, dict(zip(paths, image_ids(paths, records))), results
        )
    finally:  # so that an error or Ctrl-C loses no prediction
        if results:
            print("results:", *results.write(), sep="\n  ")
    if skipped or without:
        raise InputError(
            f"{skipped + len(without)} of --input were skipped and are named above; the others are predicted"
        )


def find_inputs(inputs, cfg):
    from gng_d2.errors import InputError
    from gng_d2.predict.predictions import find_images

    paths, without = find_images(inputs)
    keys = [given for given in without if given.split(".")[0] in cfg and ("=" in given or given[0].isupper())]
    if keys:
        raise InputError(f"{keys[0]} was taken as an --input: put another option between --input and the overrides")
    if not paths:
        raise InputError("; ".join(f"--input {given}: {reason}" for given, reason in without.items()))
    return paths, without


def check_numbers(args):
    from gng_d2.errors import InputError

    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: a score is from 0 to 1")


def check_inputs_stay(output, results, names):
    from gng_d2.errors import InputError

    folders = [output, *([results.folder] if results else [])]
    written = {os.path.realpath(os.path.join(folder, picture)) for folder in folders for _, picture in names.values()}
    ours = [path for path in names if os.path.realpath(path) in written]
    if ours:
        raise InputError(f"--output: a picture would overwrite {ours[0]}, an image of --input. Name another folder")


def write_predictions(args, settings, model, metadata, names, ids, results):
    """Write a picture for each image, add its output to ``results`` unless that is None, and return how many images
    were skipped."""
    from tqdm import tqdm

    from gng_d2.errors import InputError
    from gng_d2.predict.pictures import draw_output
    from gng_d2.predict.predictions import predict, save_png

    skipped = 0
    predictions = predict(settings, model, list(names), args.batch_size)
    for path, image, output, error in tqdm(predictions, total=len(names), unit="image"):
        if error is not None:
            tqdm.write(f"skipped: --input {path}: {error}", file=sys.stderr)
            skipped += 1
            continue
        if args.threshold is not None and "instances" in output:
            output["instances"] = output["instances"][output["instances"].scores >= args.threshold]
        if not output.keys() & {"instances", "sem_seg", "panoptic_seg"}:
            raise InputError(f"the model's output is neither instances nor a segmentation: {', '.join(output)}")
        if results:
            results.add(ids[path], *names[path], output)
        threshold = 0.5 if args.threshold is None else args.threshold
        picture = draw_output(image, output, metadata, threshold=threshold)
        save_png(picture, os.path.join(args.output, names[path][1]))
    return skipped


if __name__ == "__main__":
    run_tool(main, if_stopped="what was predicted is written")
