"""A backbone with group norms starts from the weights of one with batch norms."""

import copy
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine.train_loop import TrainerBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import distributed as dist
from torch import nn

from gng_d2.errors import InputError
from gng_d2.layers.binding import named_norms
from gng_d2.layers.producers import unchanged
from gng_d2.layers.ws_conv import WSConv2d, unstandardize
from gng_d2.models.calibrate_norms import calibrate

from .checkpoint import Checkpointer
from .data.images import NamingMapper

__all__ = ["calibrate_backbone"]

_log = logging.getLogger(__name__)


def calibrate_backbone(trainer: TrainerBase, num_images: int) -> None:
    """Fit the group norms of the backbone to the batch-norm weights in MODEL.WEIGHTS, which a new run starts from.

    For a ``train_net`` of one's own: it follows ``trainer.resume_or_load(...)`` and comes before an EMA of the weights
    is made. It does nothing in a run that went on from a checkpoint, or whose backbone has no group norms.

    The reference of :func:`~gng_d2.calibrate_norms` is a copy of the model with FrozenBN, filled from MODEL.WEIGHTS.
    Both run on the first ``num_images`` images of DATASETS.TRAIN by their sorted ids, resized as for a test, one image
    at a time. Only ``backbone.bottom_up`` (or a backbone that has none) is calibrated, frozen stages too, and of it
    only norms that MODEL.WEIGHTS has, with their convolutions: FPN and heads have no trained norms to follow. The first
    process calibrates, and the others get its weights. The random number generators stay as they were.

    Args:
        trainer: Detectron2's DefaultTrainer or one that extends it: ``cfg``, ``model`` and ``start_iter`` are used.
        num_images: what is live in the forward passes of all of them is in memory at the same time.

    Raises:
        InputError: MODEL.WEIGHTS holds no batch norms for this backbone, or the backbone cannot be run.
    """
    model = getattr(trainer.model, "module", trainer.model)
    norms = _group_norms(_bottom_up(model))
    if trainer.start_iter or not norms:
        _log.info("the backbone is not calibrated: %s", "the run goes on" if norms else "it has no group norms")
        return
    failed = None
    if comm.is_main_process():
        try:
            with unchanged(model):
                _calibrate(trainer.cfg, model, num_images)
        except InputError as error:
            failed = str(error)
    failed = comm.all_gather(failed)[0]  # so that the others do not wait for its weights
    if failed:
        raise InputError(f"--calibrate-norms: {failed}")
    if comm.get_world_size() > 1:
        for norm in norms.values():
            for parameter in norm.parameters():
                dist.broadcast(parameter.data, 0)


def _bottom_up(model):
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise InputError(f"--calibrate-norms: a {type(model).__name__} has no backbone")
    return getattr(backbone, "bottom_up", backbone)


def _group_norms(model):
    return {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.GroupNorm)}


def _calibrate(cfg, model, num_images):
    reference, trained = _reference(cfg, model)
    bottom_up = _bottom_up(model)
    prefix = next(name for name, module in model.named_modules() if module is bottom_up) + "."
    without = {name for name in _group_norms(bottom_up) if prefix + name not in trained}
    calibrate(bottom_up, _bottom_up(reference), _images(cfg, num_images), without)


def _reference(cfg, model) -> tuple[nn.Module, set[str]]:
    """What ``model`` was before its norms changed, and its norms that have trained weights, as has the layer before."""
    reference = copy.deepcopy(model)
    layers = {name: layer for name, _, layer, _ in named_norms(reference)}
    for name, norm in _group_norms(_bottom_up(reference)).items():
        frozen = FrozenBatchNorm2d(norm.num_channels).to(next(norm.parameters()).device)
        parent, _, child = name.rpartition(".")
        setattr(_bottom_up(reference).get_submodule(parent), child, frozen)
    for layer in list(_bottom_up(reference).modules()):
        if isinstance(layer, WSConv2d):
            unstandardize(layer)
    checkpointer = Checkpointer(reference)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    missing = checkpointer.missing_keys
    trained = {name for name in checkpointer.from_batch_norms if f"{layers.get(name)}.weight" not in missing}
    if not trained:
        raise InputError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r} holds no batch norms for this backbone, to which its group norms "
            f"could be fitted. Without --calibrate-norms the run starts from these weights as they are"
        )
    for norm in _bottom_up(reference).modules():
        if isinstance(norm, FrozenBatchNorm2d) and not norm.running_mean.any() and (norm.running_var == 1).all():
            norm.running_var -= norm.eps  # statistics that are folded into weight and bias
    if "MSRA" in cfg.MODEL.WEIGHTS and cfg.MODEL.RESNETS.DEPTH >= 50 and not cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        _log.warning(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} were trained with MODEL.RESNETS.STRIDE_IN_1X1 True, and the config has "
            f"False: the backbone is fitted to a network that sees shifted features"
        )
    return reference, trained


def _images(cfg: CfgNode, number: int) -> list[Any]:
    """The first images of the training set, normalized; not padded, as padding is no image."""
    records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    records.sort(key=lambda record: str(record.get("image_id", record["file_name"])).zfill(20))
    mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return [((mapper(dict(record))["image"] - mean) / std)[None] for record in records[:number]]
