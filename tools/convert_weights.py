#!/usr/bin/env python3
"""Convert a ResNet's ImageNet weights to Detectron2's names, for MODEL.WEIGHTS OUT.pkl.

    tools/convert_weights.py resnet50_gn_a1h2-8fe6c4d0.pth R-50-GN.pkl
    tools/convert_weights.py resnet50_gn_ws-15beedd8.pth R-50-GN-WS.pkl --depth 50
    tools/convert_weights.py resnet50-11ad3fa6.pth R-50-PGN.pth --norm PGN --calibrate images/*.jpg

IN is a .pth, .pt, .pth.tar or .safetensors file. Its weights have torchvision's names (conv1, bn1 or gn1,
layer1.0.downsample.0, ...), as those of timm's and mmdetection's ResNets do. They may be under state_dict or model, and
begin with a prefix such as module.backbone. Nothing in the file is run. The weights of weight-standardized convolutions
are written as they are. A file does not say how images are normalized for it: timm's resnet50_gn and resnet50_gn_ws of
Qiao et al. need INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675,116.28,103.53], MODEL.PIXEL_STD [58.395,57.12,57.375] and
MODEL.RESNETS.STRIDE_IN_1X1 False.

With --norm, batch norms become group norms, which are fitted to them on the images of --calibrate. 64 images of the
kind that the detector will see are enough, and they need no labels. OUT is then a checkpoint for models with an FPN.
"""

from command_line import count, run_tool, tool_parser


def parse_args():
    parser = tool_parser(__doc__)
    parser.add_argument("input", metavar="IN", help="a checkpoint of a ResNet with torchvision's names")
    parser.add_argument(
        "output", metavar="OUT.pkl", help="the file to write, with --norm a .pth; it is replaced if it exists"
    )
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), help="refuse a ResNet of another depth")
    parser.add_argument("--norm", metavar="NORM", help="turn batch norms into this group norm, for instance PGN")
    parser.add_argument("--calibrate", nargs="+", metavar="IMAGE", help="fit the norms of --norm on these images")
    parser.add_argument(
        "--size", type=count, default=224, metavar="PIXELS", help="shorter side of the images; default: 224"
    )
    for option, default in (("mean", [123.675, 116.28, 103.53]), ("std", [58.395, 57.12, 57.375])):
        parser.add_argument(
            f"--pixel-{option}",
            type=float,
            nargs=3,
            default=default,
            metavar="X",
            help=f"for normalizing the images, in RGB; default: {' '.join(map(str, default))}",
        )
    args = parser.parse_args()
    if bool(args.norm) != bool(args.calibrate):
        parser.error("--norm and --calibrate need each other: batch-norm weights do not fit a group norm as they are")
    if min(args.pixel_std) <= 0:
        parser.error("--pixel-std is above 0")
    return args


def main():
    args = parse_args()
    from gng_d2.errors import abbreviated
    from gng_d2.job.resnet_weights import config_keys, convert_file

    if args.norm:
        from gng_d2.job.calibrated_resnet import convert_and_calibrate, read_images

        images = read_images(args.calibrate, args.size, args.pixel_mean, args.pixel_std)
        done = convert_and_calibrate(args.input, args.output, args.norm, images, args.depth)
    else:
        done = convert_file(args.input, args.output, args.depth)
    norms = {"GN": "GroupNorm", "BN": "BatchNorm"}
    print(f"{args.output}: ResNet-{done.depth} with {args.norm or norms[done.norm]}, from {len(done.weights)} tensors")
    for reason, names in done.dropped.items():
        print(f"dropped, {reason}: {abbreviated(names)}")
    mean, std = (f"[{','.join(map(str, values))}]" for values in (args.pixel_mean, args.pixel_std))
    print(f"It needs {config_keys(done)}")
    print(
        f"and INPUT.FORMAT RGB MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std}, unless it was trained on images in "
        f"another format (Caffe's weights: Detectron2's defaults)"
    )
    if args.norm:
        print(f"and MODEL.RESNETS.NORM {args.norm}, in a model whose backbone has an FPN")
    elif done.norm == "BN":
        print(
            "Use NORM FrozenBN, BN or SyncBN. These weights do not fit GN or PGN, because a BatchNorm's weight and "
            "bias belong to its running statistics. --norm and --calibrate make them fit"
        )
    else:
        print("Use NORM GN+WS if its convolutions were weight-standardized, which the file does not say; else NORM GN")


if __name__ == "__main__":
    run_tool(main)
