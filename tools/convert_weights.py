#!/usr/bin/env python3
"""Make a ResNet's ImageNet weights Detectron2's: MODEL.WEIGHTS OUT.pkl.

    tools/convert_weights.py resnet50_gn_a1h2-8fe6c4d0.pth R-50-GN.pkl
    tools/convert_weights.py resnet50_gn_ws-15beedd8.pth R-50-GN-WS.pkl --depth 50

IN has torchvision's names (conv1, bn1 or gn1, layer1.0.downsample.0, ...), as timm's and mmdetection's
ResNets have: .pth, .pt, .pth.tar or .safetensors, with or without a state_dict or model around it and
module. or backbone. before the names. Nothing in it is executed. Weight-standardized convolutions keep
their raw weights. The names do not tell the preprocessing: timm's resnet50_gn and resnet50_gn_ws of Qiao
et al. expect INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675,116.28,103.53], MODEL.PIXEL_STD
[58.395,57.12,57.375] and MODEL.RESNETS.STRIDE_IN_1X1 False.
"""

from command_line import run_tool, tool_parser


def parse_args():
    from gng_d2.job.resnet_weights import DEPTHS

    parser = tool_parser(__doc__)
    parser.add_argument("input", metavar="IN", help="a checkpoint of a ResNet under torchvision's names")
    parser.add_argument("output", metavar="OUT.pkl", help="where Detectron2's goes; replaced if it is there")
    parser.add_argument("--depth", type=int, choices=DEPTHS, help="refuse a ResNet of another depth")
    return parser.parse_args()


def main():
    args = parse_args()
    from gng_d2.errors import abbreviated
    from gng_d2.job.resnet_weights import config_keys, convert_file

    done = convert_file(args.input, args.output, args.depth)
    norms = {"GN": "GroupNorm", "BN": "BatchNorm"}
    print(f"{args.output}: ResNet-{done.depth} with {norms[done.norm]}, {len(done.weights)} tensors")
    for reason, names in done.dropped.items():
        print(f"dropped, {reason}: {abbreviated(names)}")
    resnet, images = config_keys(done)
    print(f"It needs {resnet}")
    print(f"and, unless it was trained otherwise (Caffe's weights were: Detectron2's defaults), {images}")
    if done.norm == "BN":
        print(
            "note: these are BatchNorm weights, for NORM BN, SyncBN or FrozenBN. They do not fit GN or PGN: a "
            "BatchNorm's weight and bias belong to its running statistics"
        )
    else:
        print("The file does not tell whether its convolutions were weight-standardized: NORM GN if not, GN+WS if so")


if __name__ == "__main__":
    run_tool(main)
