"""Registers MobileNetV2 with an FPN as a backbone of Detectron2.

    tools/train_net.py --import configs/study/bccd_camvid.py configs/study/mobilenet_v2_fpn.py --calibrate-norms 64 \\
        --config-file configs/study/faster_rcnn_mobilenet_bccd.yaml \\
        MODEL.WEIGHTS 'mobilenet_v2-b0353104.pth?matching_heuristics=True'

Layers, widths and names are torchvision's, so that its ImageNet weights fit. The norm is MODEL.RESNETS.NORM.
"""

from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torchvision.models import mobilenet_v2

# name: place of the last block of its stride, channels, stride
_STAGES = {"res2": (3, 24, 4), "res3": (6, 32, 8), "res4": (13, 96, 16), "res5": (17, 320, 32)}


class MobileNetV2(Backbone):
    """torchvision's, without its last convolution and its classifier.

    Shape:
        - Input: (N, 3, H, W).
        - Output: maps by the names res2 to res5, at strides 4 to 32.
    """

    def __init__(self, norm: str):
        super().__init__()
        self.features = mobilenet_v2(norm_layer=lambda channels: get_norm(norm, channels)).features[:-1]

    def forward(self, x):
        maps = []
        for block in self.features:
            x = block(x)
            maps.append(x)
        return {name: maps[place] for name, (place, _, _) in _STAGES.items()}

    def output_shape(self):
        return {name: ShapeSpec(channels=channels, stride=stride) for name, (_, channels, stride) in _STAGES.items()}


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_backbone(cfg, input_shape):
    return FPN(
        MobileNetV2(cfg.MODEL.RESNETS.NORM),
        cfg.MODEL.FPN.IN_FEATURES,
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
