"""Every model of Detectron2 that can be built here gets its groups right, on the meta device."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.projects.panoptic_deeplab import add_panoptic_deeplab_config
from detectron2.projects.point_rend import add_pointrend_config
from omegaconf import DictConfig, ListConfig
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import gng_d2
from gng_d2.layers.group_norm import LOOKS

pytestmark = pytest.mark.slow

ZOO = Path(model_zoo.__file__).parent / "configs"
COMPILED = importlib.util.find_spec("detectron2._C") is not None


class Producers(TorchFunctionMode):
    """Remembers, for each tensor that a convolution or linear layer made, its input and output channels."""

    WEIGHT_OPS = (torch.conv2d, torch.conv_transpose2d, F.conv2d, F.conv_transpose2d, F.linear)

    def __init__(self):
        super().__init__()
        self.shapes = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.WEIGHT_OPS:
            channel = -1 if func is F.linear else 1
            self.shapes[id(out)] = (args[0].shape[channel], out.shape[channel], out)  # out: keeps the id taken
        return out


def brute_force_groups(n_in, n_out):
    bounded = min(max((n_in - n_out) / 4, 1), n_out)
    divisors = [d for d in range(1, n_out + 1) if n_out % d == 0]
    return min(divisors, key=lambda d: abs(math.log2(d) - math.log2(bounded)))


def run_parts(model):
    """Run every part that can have norms; what lies between them (proposals) depends on data."""
    features = model.backbone(torch.zeros(1, 3, 256, 256, device="meta"))
    for head in ("sem_seg_head", "ins_embed_head"):
        if hasattr(model, head):
            head = getattr(model, head)
            # PointRend's head holds the one with norms
            getattr(head, "coarse_sem_seg_head", head)(features)
    if hasattr(model, "head"):  # RetinaNet, FCOS
        model.head([features[f] for f in model.head_in_features])
    if hasattr(model, "roi_heads"):
        run_roi_heads(model.roi_heads, features)


def run_roi_heads(heads, features):
    def pooled(pooler, in_features):
        return torch.zeros(1, features[in_features[0]].shape[1], *pooler.output_size, device="meta")

    if hasattr(heads, "res5"):
        x = heads.res5(pooled(heads.pooler, heads.in_features))
        if heads.mask_on:
            heads.mask_head.layers(x)
        return
    box_heads = heads.box_head if isinstance(heads.box_head, torch.nn.ModuleList) else [heads.box_head]
    for box_head in box_heads:
        box_head(pooled(heads.box_pooler, heads.box_in_features))
    for part in ("mask", "keypoint"):
        pooler = getattr(heads, f"{part}_pooler", None)
        if pooler is not None:
            getattr(heads, f"{part}_head").layers(pooled(pooler, getattr(heads, f"{part}_in_features")))


def check_groups(model):
    norms = {name: m for name, m in model.named_modules() if isinstance(m, gng_d2.PracticalGroupNorm)}
    assert norms
    assert not [name for name, norm in norms.items() if norm.num_groups is None], "not bound when built"
    met = {}
    with Producers() as producers:  # with gradients, so that the norms look as well
        for name, norm in norms.items():
            norm.register_forward_pre_hook(
                lambda module, args, name=name: met.__setitem__(name, producers.shapes[id(args[0])][:2])
            )
        run_parts(model.eval().requires_grad_())
    assert met.keys() == norms.keys(), "a norm that no part of the model ran"
    for name, (n_in, n_out) in met.items():
        assert norms[name].num_channels == n_out
        assert norms[name].num_groups == brute_force_groups(n_in, n_out), name
        assert norms[name]._looks < LOOKS, name
    return norms


def set_norms(node, key):
    """Set every ``key`` of a config, at any depth, to PGN."""
    children = enumerate(node) if isinstance(node, ListConfig) else list(node.items())
    for name, value in children:
        if isinstance(value, (CfgNode, DictConfig, ListConfig)):
            set_norms(value, key)
        elif name == key and (value is None or isinstance(value, str)):
            node[name] = "PGN"


def build(cfg):
    set_norms(cfg.MODEL, "NORM")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def yaml_configs():
    """The zoo's YAML configs, those with the same MODEL under one of their names."""
    models = {}
    for file in sorted(ZOO.rglob("*.yaml")):
        cfg = get_cfg()
        cfg.merge_from_file(str(file), allow_unsafe=True)
        cfg.MODEL.WEIGHTS = ""
        models.setdefault(str(cfg.MODEL), (file.relative_to(ZOO).as_posix(), cfg))
    return models.values()


def needs_compiled_ops(cfg):
    return any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)


@pytest.mark.parametrize("name, cfg", [pytest.param(*x, id=x[0]) for x in yaml_configs()])
def test_yaml_config(name, cfg):
    if needs_compiled_ops(cfg) and not COMPILED:
        pytest.skip("deformable convolution, and Detectron2 is not compiled here")
    check_groups(build(cfg))


def test_no_more_than_four_yaml_configs_are_left_out():
    left_out = 0
    for file in ZOO.rglob("*.yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(file), allow_unsafe=True)
        left_out += needs_compiled_ops(cfg)
    assert left_out <= 4


def lazy_configs():
    for file in sorted(ZOO.rglob("*.py")):
        if "common" not in file.parts or file.parent.name == "models":
            yield file.relative_to(ZOO).as_posix()


def lazy_model(name):
    file = ZOO / name
    if "mmdet" in name:
        pytest.importorskip("mmdet")
    cfg = LazyConfig.load(str(file))
    if "model" not in cfg:
        pytest.skip("no model in it")
    return cfg.model


@pytest.mark.parametrize("name", lazy_configs())
def test_lazy_config(name):
    model = lazy_model(name)
    set_norms(model, "norm")
    if "PGN" not in str(model):
        pytest.skip("no norm to choose in it")
    if "vitdet" in name:  # ViT reads a tensor while it is built, and its forward wants the size it was made for
        model.backbone.net.update(img_size=256, depth=1)
    with torch.device("cpu" if "vitdet" in name else "meta"):
        model = instantiate(model)
    check_groups(model.to("meta"))


def deeplab_v3_plus():
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
    cfg.MODEL.RESNETS.RES5_DILATION = 2
    cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabV3PlusHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res5"]
    return cfg


def deeplab_v3():
    cfg = deeplab_v3_plus()
    cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabV3Head"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    return cfg


def panoptic_deeplab():
    cfg = get_cfg()
    add_panoptic_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PanopticDeepLab"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PanopticDeepLabSemSegHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES = ["res2", "res3"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = [32, 64]
    cfg.MODEL.PANOPTIC_DEEPLAB.USE_DEPTHWISE_SEPARABLE_CONV = True
    cfg.MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV = True
    cfg.DATASETS.TRAIN = ("cityscapes_fine_panoptic_train",)
    return cfg


def point_rend():
    cfg = get_cfg()
    cfg.merge_from_file(str(ZOO / "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    add_pointrend_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PointRendMaskHead"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
    return cfg


def point_rend_semantic():
    cfg = get_cfg()
    cfg.merge_from_file(str(ZOO / "Misc/semantic_R_50_FPN_1x.yaml"))
    add_pointrend_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PointRendSemSegHead"
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    return cfg


@pytest.mark.parametrize("stem", ["basic", "deeplab"])
@pytest.mark.parametrize("config", [deeplab_v3, deeplab_v3_plus, panoptic_deeplab])
def test_deeplab_projects(config, stem):
    cfg = config()
    cfg.MODEL.RESNETS.STEM_TYPE = stem
    if stem == "deeplab":
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 128
    norms = check_groups(build(cfg))
    assert any("head" in name for name in norms)


@pytest.mark.parametrize("config", [point_rend, point_rend_semantic])
def test_point_rend_project(config):
    check_groups(build(config()))
