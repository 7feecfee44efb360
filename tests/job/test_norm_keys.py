"""Keys whose norm a head ignores, because it compares names literally."""

import logging
import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

import analyze_groups
from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from gng_d2.job.norm_keys import check_norm_keys


def asks(norm, width):
    return get_norm(norm, width)


def like_fcos(norm, width):  # AdelaiDet's: no norm
    return nn.GroupNorm(32, width) if norm == "GN" else nn.BatchNorm2d(width) if norm == "BN" else None


def like_sparseinst(norm, width):  # CSPNet: BatchNorm
    return nn.GroupNorm(32, width) if norm == "GN" else nn.BatchNorm2d(width)


def like_old_semantic_fpn(norm, width):  # Detectron2 before 0.4
    return nn.GroupNorm(32, width) if norm == "GN" else None


def knows_bn_alone(norm, width):
    return nn.BatchNorm2d(width) if norm == "BN" else None


def levels_of_bn(norm, width):  # as RetinaNet: one for each level of the pyramid
    return nn.ModuleList([nn.BatchNorm2d(width) for _ in range(3)]) if norm == "BN" else get_norm(norm, width)


def ignores(norm, width):
    return nn.BatchNorm2d(width)


HEADS = {f.__name__: f for f in (asks, like_fcos, like_sparseinst, like_old_semantic_fpn, knows_bn_alone, levels_of_bn)}
HEADS["ignores"] = ignores


def unbuildable(norm, width):
    raise RuntimeError("needs another machine")


def reads_numbers(norm, width):  # of a tensor, as transformers do whose layers are dropped more often with the depth
    return like_fcos(norm, width) if torch.linspace(0, 1, 3)[-1].item() == 1 else None


def reads_its_weights(norm, width):
    return like_fcos(norm, width) if nn.Linear(2, 2).weight.abs().sum().item() > 0 else None


HEADS["unbuildable"] = unbuildable


@META_ARCH_REGISTRY.register()
class TestModelOfNormKeys(nn.Module):
    """A tower whose norms come from MODEL.HEAD.NORM, and one that asks for MODEL.FPN.NORM, as in Detectron2."""

    __test__ = False

    def __init__(self, cfg):
        super().__init__()
        make = HEADS[cfg.MODEL.HEAD.NAME]
        self.head = nn.ModuleList()
        for _ in range(2):
            self.head += [nn.Conv2d(64, 64, 1), make(cfg.MODEL.HEAD.NORM, 64) or nn.Identity()]
        self.neck = nn.Sequential(nn.Conv2d(64, 64, 1), get_norm(cfg.MODEL.FPN.NORM, 64) or nn.Identity())


def config(head, norm, **others):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "TestModelOfNormKeys"
    cfg.MODEL.HEAD = type(cfg)({"NAME": head, "NORM": norm})
    for key, value in others.items():
        cfg.MODEL[key].NORM = value
    return cfg


OURS = ["PGN", "GN1", "GN16", "GN32", "GN/4", "PGN+WS", "GN+WS"]


@pytest.mark.parametrize("norm", OURS)
@pytest.mark.parametrize("head", ["like_fcos", "like_sparseinst", "like_old_semantic_fpn", "knows_bn_alone"])
def test_a_head_that_compares_names(head, norm):
    cfg = config(head, norm, FPN="PGN")
    with pytest.raises(InputError, match=rf"^MODEL.HEAD.NORM: {re.escape(norm)} makes .* at head\.1 and 1 more, "):
        check_norm_keys(cfg, build_on_meta(cfg))


def test_the_message_says_what_was_made():
    with pytest.raises(InputError, match="makes no norm at head.1 and 1 more, where GN makes GN"):
        check_norm_keys(config("like_fcos", "PGN"))
    with pytest.raises(InputError, match="makes BN at head.1 and 1 more, where GN makes GN"):
        check_norm_keys(config("like_sparseinst", "PGN"))
    with pytest.raises(InputError, match="makes no norm at head.1 and 1 more, where BN makes BN.*get_norm"):
        check_norm_keys(config("knows_bn_alone", "PGN"))


@pytest.mark.parametrize("head", ["asks", "levels_of_bn"])
@pytest.mark.parametrize("norm", OURS)
def test_a_head_that_asks_get_norm(head, norm, caplog):
    cfg = config(head, norm, FPN="PGN")
    check_norm_keys(cfg, build_on_meta(cfg))
    check_norm_keys(cfg, build_model(cfg))  # a real one as well
    assert not caplog.records


def test_names_that_are_not_ours_are_silent(caplog):
    caplog.set_level(logging.INFO)
    for norm in ("GN", "BN", "", "FrozenBN"):
        check_norm_keys(config("like_fcos", norm))
    assert not caplog.records


def test_keys_that_change_nothing_are_one_line(caplog):
    """As ROI_BOX_HEAD.NORM where the box head is fully connected."""
    caplog.set_level(logging.INFO)
    check_norm_keys(config("ignores", "PGN", RESNETS="GN1"))
    (message,) = [record.message for record in caplog.records]
    assert sorted(message.split(":")[0].split(", ")) == ["MODEL.HEAD.NORM PGN", "MODEL.RESNETS.NORM GN1"]
    assert "changes nothing" in message and caplog.records[0].levelname == "INFO"


def test_a_part_that_compares_names_is_found_beside_one_that_asks():
    made = iter([asks, like_fcos] * 4)
    HEADS["both"] = lambda norm, width: next(made)(norm, width)
    with pytest.raises(InputError, match="MODEL.HEAD.NORM: PGN makes no norm at head.3, where GN makes GN"):
        check_norm_keys(config("both", "PGN"))


def test_a_model_that_cannot_be_built_is_not_checked_and_says_why(caplog):
    check_norm_keys(config("unbuildable", "PGN"))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.message.startswith("MODEL.HEAD.NORM PGN: not checked")
    assert "RuntimeError: needs another machine" in record.message


@pytest.mark.parametrize("head", [reads_numbers, reads_its_weights])
def test_a_model_that_computes_while_it_is_built_is_checked(head, monkeypatch):
    """On the meta device there are no numbers."""
    monkeypatch.setitem(HEADS, "computes", head)
    with pytest.raises(InputError, match="MODEL.HEAD.NORM: PGN makes no norm at head.1 and 1 more"):
        check_norm_keys(config("computes", "PGN"))


def test_a_model_of_another_projects_registry_is_built_by_its_class():
    """As CutLER's, which looks for its meta architecture and its heads in registries of its own."""

    class Elsewhere(TestModelOfNormKeys):
        pass

    cfg = config("like_fcos", "PGN")
    cfg.MODEL.META_ARCHITECTURE = "Elsewhere"
    with pytest.raises(InputError, match="MODEL.HEAD.NORM: PGN makes no norm at head.1 and 1 more"):
        check_norm_keys(cfg, Elsewhere(cfg))


def test_a_model_of_another_projects_registry_is_named(caplog):
    cfg = config("asks", "PGN")
    cfg.MODEL.META_ARCHITECTURE = "Elsewhere"
    check_norm_keys(cfg)
    assert "No object named 'Elsewhere' found in 'META_ARCH' registry!" in caplog.text and "meta dev" not in caplog.text


TRANSFORMERS = {
    "ViTDet": "",
    "Swin": """
model.backbone.bottom_up = L(SwinTransformer)(depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
model.backbone.in_features = ("p0", "p1", "p2", "p3")
model.backbone.square_pad = 1024
""",
    "MViTv2": """
model.backbone.bottom_up = L(MViT)(
    embed_dim=96, depth=10, num_heads=1, last_block_indexes=(0, 2, 7, 9), residual_pooling=True, drop_path_rate=0.2,
    out_features=("scale2", "scale3", "scale4", "scale5"),
)
model.backbone.in_features = "${.bottom_up.out_features}"
""",
}


COMPARES_NAMES = """
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
class ComparesNames(FastRCNNConvFCHead):
    def __init__(self, *args, conv_norm="", **options):
        super().__init__(*args, conv_norm=conv_norm if conv_norm in ("GN", "BN", "LN") else "", **options)
model.roi_heads.box_head._target_ = ComparesNames
"""


@pytest.fixture(params=TRANSFORMERS)
def transformer(request, tmp_path):
    """The path of a lazy config as Detectron2's ViTDet project has it, PGN in the box head."""
    fpn = TRANSFORMERS[request.param]
    (tmp_path / "config.py").write_text(
        f"""from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import MViT, SwinTransformer
model = model_zoo.get_config("common/models/{"mask_rcnn_fpn.py" if fpn else "mask_rcnn_vitdet.py"}").model
{fpn}
model.roi_heads.box_head.conv_dims, model.roi_heads.box_head.conv_norm = [256, 256], "PGN"
"""
    )
    return tmp_path / "config.py"


def test_transformers_of_lazy_configs_are_analyzed_and_checked(transformer, monkeypatch, capsys, caplog):
    monkeypatch.setattr("sys.argv", ["analyze_groups.py", "--ours", "--config-file", str(transformer)])
    analyze_groups.main()
    assert "roi_heads.box_head.conv1.norm  PGN" in capsys.readouterr().out
    assert not caplog.records
    with transformer.open("a") as file:
        file.write(COMPARES_NAMES)
    with pytest.raises(
        InputError, match=r"^model.roi_heads.box_head.conv_norm: PGN makes no norm at roi_heads.box_hea"
    ):
        analyze_groups.main()


def test_the_config_is_left_alone():
    cfg = config("asks", "PGN")
    cfg.freeze()
    before = str(cfg)
    check_norm_keys(cfg, build_on_meta(cfg))
    assert str(cfg) == before and cfg.is_frozen()


@pytest.mark.parametrize(
    "file", ["configs/pfpn_pgn.yaml", "configs/faster_rcnn_pgn_ws.yaml", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"]
)
def test_detectron2s_models_pass(file, caplog):
    overrides = ["MODEL.RESNETS.NORM", "PGN", "MODEL.FPN.NORM", "PGN", "MODEL.ROI_MASK_HEAD.NORM", "PGN"]
    if "retinanet" in file:
        overrides += ["MODEL.RETINANET.NORM", "GN16"]
    cfg = load_config(file, overrides)
    check_norm_keys(cfg, build_on_meta(cfg))
    assert "not checked" not in caplog.text
