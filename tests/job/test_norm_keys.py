"""Keys whose norm a head ignores, because it compares names literally."""

import logging
import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

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
    return torch.zeros(2).sum().item() or get_norm(norm, width)  # a number, which meta has none of


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


def test_a_key_that_nothing_reads_and_names_that_are_not_ours_are_silent(caplog):
    check_norm_keys(config("ignores", "PGN"))
    for norm in ("GN", "BN", "", "FrozenBN"):
        check_norm_keys(config("like_fcos", norm))
    assert not caplog.records


def test_a_part_that_compares_names_is_found_beside_one_that_asks():
    made = iter([asks, like_fcos] * 4)
    HEADS["both"] = lambda norm, width: next(made)(norm, width)
    with pytest.raises(InputError, match="MODEL.HEAD.NORM: PGN makes no norm at head.3, where GN makes GN"):
        check_norm_keys(config("both", "PGN"))


def test_a_model_that_cannot_be_built_on_meta_is_not_checked(caplog):
    with caplog.at_level(logging.INFO):
        check_norm_keys(config("unbuildable", "PGN"))
    assert "MODEL.HEAD.NORM PGN: not checked" in caplog.text


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
