#!/usr/bin/env python3
"""Predict on images and write the pictures.

    tools/predict.py --config-file configs/quick/pfpn_pgn.yaml \\
        --weights output/quick_pfpn_pgn/model_final.pth --input photo.jpg other.png --output predictions
"""

import os

from command_line import add_import, add_overrides, run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a path or a name in Detectron2's model zoo"
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of that config's model")
    parser.add_argument("--input", required=True, nargs="+", metavar="IMG", help="images, up to the next option")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures, named as the images")
    add_import(parser)
    add_overrides(parser)
    return parser.parse_args()


def check_images(inputs, output):
    """The paths of the pictures of ``inputs``, if each can have its own."""
    from gng_d2.errors import InputError

    missing = [path for path in inputs if not os.path.isfile(path)]
    if missing:
        raise InputError(f"--input: {', '.join(missing)} not found. It takes every word up to the next option")
    pictures = [os.path.join(output, os.path.splitext(os.path.basename(path))[0] + ".png") for path in inputs]
    if len(set(pictures)) < len(pictures):
        raise InputError("--input: two images have the same name, their pictures would overwrite each other")
    if set(map(os.path.realpath, inputs)) & set(map(os.path.realpath, pictures)):
        raise InputError("--output: a picture would overwrite an image of --input. Name another folder")
    return pictures


def main():
    args = parse_args()
    from detectron2.modeling import build_model
    from PIL import Image
    from tqdm import tqdm

    from gng_d2 import fold_weight_standardization
    from gng_d2.checkpoint import Checkpointer
    from gng_d2.config import check_config, check_output_dir, check_weights, load_config
    from gng_d2.errors import InputError
    from gng_d2.files import atomic_open
    from gng_d2.imports import import_modules
    from gng_d2.visualize import draw_prediction

    import_modules(args.imports)
    cfg = load_config(args.config_file, ["MODEL.WEIGHTS", args.weights, "OUTPUT_DIR", args.output, *args.opts])
    check_config(cfg)
    check_weights(cfg)
    pictures = check_images(args.input, args.output)
    check_output_dir(cfg)
    model = build_model(cfg).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    fold_weight_standardization(model)
    for path, picture in zip(tqdm(args.input, unit="image"), pictures):
        try:
            drawn = draw_prediction(cfg, model, path)
        except OSError as error:
            raise InputError(f"--input: {path} cannot be read as an image: {error}") from error
        with atomic_open(picture, "wb") as file:
            Image.fromarray(drawn).save(file, format="PNG")


if __name__ == "__main__":
    run_tool(main)
