#!/usr/bin/env python3
"""Predict on images and write the pictures.

    tools/predict.py --config-file configs/quick/pfpn_pgn.yaml \\
        --weights output/quick_pfpn_pgn/model_final.pth --input photo.jpg other.png --output predictions
"""

import argparse
import os
import sys

import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from PIL import Image
from tqdm import tqdm

import gng_d2
from gng_d2.checkpoint import Checkpointer
from gng_d2.config import check_config, check_weights, load_config, prepare_output_dir
from gng_d2.errors import InputError
from gng_d2.imports import add_import_argument, import_modules
from gng_d2.visualize import draw_output
from gng_d2.weight_files import add_trust_argument


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a path or a name in Detectron2's model zoo"
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of that config's model")
    parser.add_argument("--input", required=True, nargs="+", metavar="IMG", help="images")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures, named as the images")
    add_import_argument(parser)
    add_trust_argument(parser)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs that override the config")
    return parser.parse_args()


def predict(cfg, model, path):
    """The model's output for one image file, and that image, (H, W, 3) uint8 RGB."""
    image = read_image(path, cfg.INPUT.FORMAT)
    resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    resized = resize.get_transform(image).apply_image(image)
    tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1).copy())
    with torch.no_grad():
        output = model([{"image": tensor, "height": image.shape[0], "width": image.shape[1]}])[0]
    return output, read_image(path, "RGB")


def main(args):
    import_modules(args.imports)
    cfg = load_config(args.config_file, ["MODEL.WEIGHTS", args.weights, "OUTPUT_DIR", args.output, *args.opts])
    check_config(cfg)
    check_weights(cfg, "--weights")
    missing = [path for path in args.input if not os.path.isfile(path)]
    if missing:
        raise InputError(f"--input: {', '.join(missing)} not found")
    names = [os.path.splitext(os.path.basename(path))[0] + ".png" for path in args.input]
    if len(set(names)) < len(names):
        raise InputError("--input: two images have the same name, their pictures would overwrite each other")
    inputs = {os.path.realpath(path) for path in args.input}
    if inputs & {os.path.realpath(os.path.join(args.output, name)) for name in names}:
        raise InputError("--output: a picture would overwrite an image of --input. Name another folder")
    prepare_output_dir(cfg)
    model = build_model(cfg).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    gng_d2.fold_weight_standardization(model)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0] if len(cfg.DATASETS.TEST) else "__unused")
    for path, name in zip(tqdm(args.input, unit="image"), names):
        try:
            output, image = predict(cfg, model, path)
        except OSError as error:
            raise InputError(f"--input: {path} cannot be read as an image: {error}") from error
        picture = draw_output(image, output, metadata)
        Image.fromarray(picture).save(os.path.join(args.output, name))


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(f"error: {error}")
