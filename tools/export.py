#!/usr/bin/env python3
"""Export a trained model to a file that runs without gng_d2 and Detectron2, and check it.

    tools/export.py --config-file configs/quick/faster_rcnn_pgn_ws.yaml \\
        --weights output/quick_faster_rcnn_pgn_ws/model_final.pth --format onnx --output model.onnx

The exported file takes images
                  torchscript                  onnx                         torch_export
    whole model   one, of any size             one, of any size             one, of one size (some semantic models)
    --backbone    any number, of any size      any number, of any size      any number, of any size

Before the file is written, it is loaded in a process that can import neither gng_d2 nor Detectron2, for ONNX in ONNX
Runtime, and run on two images. Every output must equal the model's within 1e-3 of its largest value.
Weight standardization is folded into the weights. The step that combines the two heads of a panoptic model is Python
code and is not in the file: detectron2.modeling.meta_arch.panoptic_fpn.combine_semantic_and_instance_outputs.
"""

from command_line import add_config_file, add_import, add_overrides, add_trust, run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    add_config_file(parser)
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint of that config's model")
    parser.add_argument("--format", required=True, choices=("torchscript", "onnx", "torch_export"))
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--backbone", action="store_true", help="export the backbone alone, from a batch to feature maps"
    )
    parser.add_argument("--image", metavar="IMG", help="the image to trace and check with; default: a drawn one")
    add_import(parser)
    add_trust(parser)
    add_overrides(parser, lazy=True)
    return parser.parse_args()


def main():
    args = parse_args()
    import torch

    from gng_d2.job.build import build
    from gng_d2.job.checkpoint import load_model
    from gng_d2.job.config import check_weight_file, load_any_config
    from gng_d2.job.files import atomic_open, prepare_outputs
    from gng_d2.job.imports import import_modules
    from gng_d2.predict import export
    from gng_d2.predict.predictions import model_input
    from gng_d2.predict.settings import prediction_settings

    export.check_format(args.format)
    import_modules(args.imports)
    cfg = load_any_config(args.config_file, args.opts)
    settings = prediction_settings(cfg)
    check_weight_file(args.weights, "--weights")
    prepare_outputs(args.output)
    images = example_images(settings.image_format, args.image, args.format == "torch_export" and not args.backbone)
    # An exported model stays on its device. So it is exported on the CPU unless the overrides name a device.
    names_device = any(word.startswith(("MODEL.DEVICE", "train.device=")) for word in args.opts)
    model = load_model(build(cfg, None if names_device else "cpu"), args.weights)
    device = next(model.parameters()).device
    first, second = (model_input(settings, image)["image"].to(device) for image in images)
    if args.backbone:
        first, second = export.backbone_input(model, first), export.backbone_input(model, second)
        first = torch.cat([first, first.flip(-1)])
    adapter = export.trace(model, first, args.backbone)

    content = export.export(adapter, args.format)
    results = export.load_and_run(content, args.format, [first, second])
    difference = export.largest_difference(adapter, [first, second], results)
    with atomic_open(args.output, "wb") as file:
        file.write(content)
    print(describe(settings.image_format, args.backbone, model, first, export.output_names(adapter), results))
    print(
        f"wrote {args.output}, which runs without gng_d2 and differs from the model by {difference:.1e} (limit "
        f"{export.TOLERANCE:.0e})"
    )


def example_images(image_format, path, one_size):
    """Two images in ``image_format``. They have different shapes unless both must have ``one_size``."""
    import numpy as np
    from detectron2.data.detection_utils import convert_PIL_to_numpy
    from PIL import Image

    from gng_d2.errors import InputError
    from gng_d2.job.data.images import read_image
    from gng_d2.job.data.shapes import draw_scene

    if path is None:
        scene = draw_scene(np.random.default_rng(0)).image
        image = convert_PIL_to_numpy(Image.fromarray(scene), image_format)
    else:
        try:
            image = read_image(path, image_format)
        except Exception as error:  # broken files raise errors of many kinds
            raise InputError(f"--image: {path} cannot be read as an image: {error}") from error
    return image, image[:, ::-1] if one_size else image[: max(1, len(image) * 3 // 4)]


def describe(image_format, is_backbone, model, example, names, results):
    """A text that says what the file takes and returns."""
    from gng_d2.predict.export import MIN_SIDE

    if is_backbone:
        mean, std = ([round(x, 3) for x in t.flatten().tolist()] for t in (model.pixel_mean, model.pixel_std))
        taken = (
            f"images: (N, 3, H, W), float32, {image_format}, minus {mean}, divided by {std}; H and W are multiples of "
        )
        taken += f"{max(model.backbone.size_divisibility, 1)} and at least {MIN_SIDE}"
    else:
        taken = f"image: (3, H, W), float32, {image_format} from 0 to 255, resized as the config says (here to "
        taken += f"{example.shape[1]} x {example.shape[2]})"
    lines = ["input", f"  {taken}", "outputs for the two images that were compared"]
    lines += [f"  {name}: {' and '.join(str(tuple(r[i].shape)) for r in results)}" for i, name in enumerate(names)]
    if "scores" in names and not all(len(result[names.index("scores")]) for result in results):
        lines.append("One of the images has no detections to compare. Give --image an image with objects in it")
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
