"""A backbone with group norms starts from the weights of one with batch norms."""

import copy
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import distributed as dist
from torch import nn

from gng_d2.errors import InputError
from gng_d2.layers.binding import named_norms
from gng_d2.layers.running import unchanged, uncompiled
from gng_d2.layers.ws_conv import WSConv2d, unstandardize
from gng_d2.models.calibrate_norms import calibrate

from .checkpoint import Checkpointer
from .data.images import NamingMapper

_log = logging.getLogger(__name__)


def calibrate_backbone(model: nn.Module, cfg: CfgNode, num_images: int) -> None:
    """Fit the group norms of the backbone to the batch norms in MODEL.WEIGHTS, which ``model`` has loaded.

    In a training loop of one's own it is one line after the weights are loaded, before the first step and before an EMA
    copies them: ``calibrate_backbone(model, cfg, 64)``. A run that goes on from a checkpoint leaves it out, because it
    would lose what its norms have learned. A backbone without group norms stays as it is.

    The reference of :func:`~gng_d2.calibrate_norms` is a copy of the model with FrozenBN, filled from MODEL.WEIGHTS.
    Both run on the first ``num_images`` images of DATASETS.TRAIN by their sorted ids, resized as for a test, one image
    at a time. Only ``backbone.bottom_up`` (or a backbone that has none) is calibrated, with its frozen stages. A norm
    keeps its affine if MODEL.WEIGHTS lacks it or its convolution, as it lacks those of FPN and heads. The first process
    calibrates, and the others get its affines. The random number generators stay as they were.

    Args:
        model: a Detectron2 model, also one inside DDP, in which each process calls this.
        num_images: 64 are enough. What is live in the forward passes of all of them is in memory at the same time.

    Raises:
        InputError: MODEL.WEIGHTS holds no batch norms for this backbone, or the backbone cannot be run.
    """
    if not isinstance(cfg, CfgNode):
        raise InputError(
            f"calibrate_backbone(model, cfg, num_images): cfg is the config from which Detectron2 built the model, a "
            f"CfgNode, not {type(cfg).__name__}. A model of a lazy config is calibrated by gng_d2.calibrate_norms"
        )
    model = uncompiled(getattr(model, "module", model))
    norms = _group_norms(_bottom_up(model))
    if not norms:
        _log.info("the backbone is not calibrated: it has no group norms")
        return
    failed = None
    if comm.is_main_process():
        try:
            with unchanged(model):
                reference, without = _reference(cfg, model)
                calibrate(_bottom_up(model), _bottom_up(reference), _images(cfg, num_images), without)
        except InputError as error:
            failed = str(error)
    failed = comm.all_gather(failed)[0]  # so that the others do not wait for its affines
    if failed:
        raise InputError(f"the backbone cannot be calibrated: {failed}")
    if comm.get_world_size() > 1:
        for norm in norms.values():
            for parameter in norm.parameters():
                dist.broadcast(parameter.data, 0)


def _bottom_up(model):
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise InputError(f"the backbone cannot be calibrated: a {type(model).__name__} has none")
    return getattr(backbone, "bottom_up", backbone)


def _group_norms(model):
    return {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.GroupNorm)}


def _reference(cfg, model) -> tuple[nn.Module, set[str]]:
    """What ``model`` was before its norms changed, and the names of its backbone's norms that have no trained weights,
    or whose convolution has none."""
    reference = copy.deepcopy(model)
    bottom_up = _bottom_up(reference)
    layers = {name: layer for name, _, layer, _ in named_norms(reference)}
    norms = _group_norms(bottom_up)
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        device = next(norm.parameters(), next(bottom_up.parameters())).device
        setattr(bottom_up.get_submodule(parent), child, FrozenBatchNorm2d(norm.num_channels).to(device))
    for layer in list(bottom_up.modules()):
        if isinstance(layer, WSConv2d):
            unstandardize(layer)
    checkpointer = Checkpointer(reference)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    missing = checkpointer.missing_keys
    trained = [name for name in checkpointer.from_batch_norms if f"{layers.get(name)}.weight" not in missing]
    if not trained:
        raise InputError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r} holds no batch norms for it, to which its group norms could be fitted"
        )
    for norm in bottom_up.modules():
        if isinstance(norm, FrozenBatchNorm2d) and not norm.running_mean.any() and (norm.running_var == 1).all():
            norm.running_var -= norm.eps  # its statistics are folded into weight and bias
    if "MSRA" in cfg.MODEL.WEIGHTS and cfg.MODEL.RESNETS.DEPTH >= 50 and not cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        _log.warning(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} were trained with MODEL.RESNETS.STRIDE_IN_1X1 True, and the config has "
            f"False: the backbone is fitted to a network that sees shifted features"
        )
    trained = [reference.get_submodule(name) for name in trained]
    return reference, {name for name in norms if bottom_up.get_submodule(name) not in trained}


def _images(cfg: CfgNode, number: int) -> list[Any]:
    """The first images of the training set, normalized. They are not padded, because padding would count as image."""
    records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    if number < 1:
        raise InputError(f"num_images is {number}, and at least 1 is needed")
    if not records:
        raise InputError(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN} has no images")
    records.sort(key=lambda record: str(record.get("image_id", record["file_name"])).zfill(20))
    mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return [((mapper(dict(record))["image"] - mean) / std)[None] for record in records[:number]]
