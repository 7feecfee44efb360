#!/usr/bin/env python3
"""Export a trained model to a file that runs without gng_d2 and Detectron2, and check it.

    tools/export.py --config-file configs/quick/faster_rcnn_pgn_ws.yaml \\
        --weights output/quick_faster_rcnn_pgn_ws/model_final.pth --format onnx --output model.onnx

                  torchscript          onnx                 torch_export
    whole model   any size             any size             some semantic models, of one size
    --backbone    any number and size  any number and size  any number and size

The file is loaded again in a process where gng_d2 and Detectron2 cannot be imported, ONNX in ONNX Runtime, and run on
two images. It is written only if each output differs from the model's by less than 1e-3 of its largest value.
Weight standardization is folded into the weights. The combination of a panoptic model's heads is Python, and not in
the file: it is detectron2.modeling.meta_arch.panoptic_fpn.combine_semantic_and_instance_outputs.
"""

from command_line import add_import, add_overrides, add_trust, run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a path or a name in Detectron2's model zoo"
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of that config's model")
    parser.add_argument("--format", required=True, choices=("torchscript", "onnx", "torch_export"))
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--backbone", action="store_true", help="the backbone alone: from a batch to feature maps")
    parser.add_argument("--image", metavar="IMG", help="an image to trace and check with; one is drawn without it")
    add_import(parser)
    add_trust(parser)
    add_overrides(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    import os
    import shutil
    import tempfile

    import torch

    from gng_d2.job.build import build
    from gng_d2.job.config import check_config, check_weights, load_config
    from gng_d2.job.files import atomic_open, prepare_outputs
    from gng_d2.job.imports import import_modules
    from gng_d2.predict import export
    from gng_d2.predict.predictions import load_model, model_input
    from gng_d2.predict.settings import prediction_settings

    export.check_installed(args.format)
    import_modules(args.imports)
    # On the CPU, unless the user says otherwise: a traced model keeps its device.
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", args.weights, *args.opts])
    check_config(cfg)
    check_weights(cfg, "--weights")
    prepare_outputs(args.output)
    if args.backbone:
        cfg.INPUT.MIN_SIZE_TEST = max(cfg.INPUT.MIN_SIZE_TEST, export.MIN_SIDE)
        cfg.INPUT.MAX_SIZE_TEST = max(cfg.INPUT.MAX_SIZE_TEST, 2 * export.MIN_SIDE)
    images = example_images(cfg, args.image, one_size=args.format == "torch_export" and not args.backbone)
    model, settings = load_model(build(cfg), cfg.MODEL.WEIGHTS), prediction_settings(cfg)
    first, second = (model_input(settings, image)["image"].to(cfg.MODEL.DEVICE) for image in images)
    if args.backbone:
        first, second = export.backbone_input(model, first), export.backbone_input(model, second)
        first = torch.cat([first, first.flip(-1)])
    adapter = (export.trace_backbone if args.backbone else export.trace_model)(model, first)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt2")  # PyTorch remarks on other endings
        export.export(adapter, args.format, path)
        results = export.load_and_run(path, args.format, [first, second])
        difference = export.largest_difference(adapter, [first, second], results)
        with open(path, "rb") as source, atomic_open(args.output, "wb") as target:
            shutil.copyfileobj(source, target)
    print(describe(cfg, args, model, export.output_names(adapter), results))
    print(f"wrote {args.output}: runs without gng_d2, differs by {difference:.1e} (limit {export.TOLERANCE:.0e})")


def example_images(cfg, path, one_size):
    """Two images in INPUT.FORMAT, of two shapes unless all must have ``one_size``."""
    import numpy as np
    from detectron2.data.detection_utils import convert_PIL_to_numpy, read_image
    from PIL import Image

    from gng_d2.errors import InputError
    from gng_d2.job.data.shapes import draw_scene

    if path is None:
        scene = draw_scene(np.random.default_rng(0)).image
        image = convert_PIL_to_numpy(Image.fromarray(scene), cfg.INPUT.FORMAT)
    else:
        try:
            image = read_image(path, cfg.INPUT.FORMAT)
        except Exception as error:  # broken files have raised a dozen kinds
            raise InputError(f"--image: {path} cannot be read as an image: {error}") from error
    return image, image[:, ::-1] if one_size else image[: max(1, len(image) * 3 // 4)]


def describe(cfg, args, model, names, results):
    """What goes into the file and what comes out, for whoever runs it."""
    from gng_d2.predict import export

    if args.backbone:
        taken = f"images: (N, 3, H, W), float32, {cfg.INPUT.FORMAT}, minus {cfg.MODEL.PIXEL_MEAN}, divided by "
        taken += f"{cfg.MODEL.PIXEL_STD}; H and W multiples of {max(model.backbone.size_divisibility, 1)}, "
        taken += f"{export.MIN_SIDE} at least"
    else:
        taken = f"image: (3, H, W), float32, {cfg.INPUT.FORMAT} from 0 to 255; its shorter side is trained for "
        taken += f"{cfg.INPUT.MIN_SIZE_TEST} pixels"
    lines = ["input", f"  {taken}", "outputs, of the two images that were compared"]
    lines += [f"  {name}: {' and '.join(str(tuple(r[i].shape)) for r in results)}" for i, name in enumerate(names)]
    if "scores" in names and not all(len(result[names.index("scores")]) for result in results):
        lines.append("no detections in an image, so they are compared in number only. --image takes one with objects")
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
