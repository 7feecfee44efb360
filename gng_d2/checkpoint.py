"""Detectron2's checkpointer, which knows the groups that its weights were trained with."""

import logging
from collections.abc import Mapping
from typing import Dict, Optional
from urllib.parse import urlparse

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from .analysis import norm_table
from .errors import InputError

__all__ = ["Checkpointer", "norm_record", "check_norms"]


class Checkpointer(DetectionCheckpointer):
    """:class:`detectron2.checkpoint.DetectionCheckpointer` with three more checks.

    - GroupNorm weights fit any number of groups. So a checkpoint records each norm's groups, and whether
      its convolution is standardized (plain Detectron2 loads it all the same). Loading it into a model where
      they differ is an :class:`InputError`; at the start of fine-tuning it is one warning. A checkpoint
      without the record is taken as it is.
    - BatchNorm weights that arrive in a GroupNorm (same names, same shapes, other meaning) are one warning.
    - A file that is no checkpoint is an :class:`InputError` with its name.
    """

    _fine_tuning = False

    def save(self, name, **kwargs):
        super().save(name, norms=norm_record(self.model), **kwargs)

    def load(self, path, *args, **kwargs):
        if path and "://" in path:
            try:
                self.path_manager.get_local_path(path.split("?")[0])
            except Exception as error:  # each way of fetching raises its own
                raise InputError(f"MODEL.WEIGHTS: {path} cannot be fetched: {error}") from error
        return super().load(path, *args, **kwargs)

    def resume_or_load(self, path, *, resume=True):
        self._fine_tuning = not (resume and self.has_checkpoint())
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._fine_tuning = False

    def read(self, path: str) -> Dict:
        """What the local file ``path`` holds, under ``model`` its weights."""
        self._parsed_url_during_load = urlparse(path)
        try:
            return self._load_file(path.split("?")[0])
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename):
        try:
            checkpoint = super()._load_file(filename)
        except Exception as error:  # a damaged file has raised a dozen kinds
            raise InputError(
                f"MODEL.WEIGHTS: {filename} cannot be read as a checkpoint ({type(error).__name__}: {error}). "
                f"Is the download whole? A run's own last checkpoint is named in its last_checkpoint file"
            ) from error
        weights = checkpoint["model"]
        if not isinstance(weights, Mapping) or not all(isinstance(v, (Tensor, np.ndarray)) for v in weights.values()):
            raise InputError(
                f"MODEL.WEIGHTS: {filename} holds no weights by name under 'model', as Detectron2's checkpoints do. "
                f"tools/convert_weights.py converts ResNets of torchvision, timm and mmdetection"
            )
        return checkpoint

    def _load_model(self, checkpoint):
        self._check_norms(checkpoint.pop("norms", None))
        batch_norms = _batch_norms(checkpoint)
        incompatible = super()._load_model(checkpoint)
        self._warn_of_batch_norms(batch_norms, set(incompatible.missing_keys))
        return incompatible

    def _check_norms(self, recorded):
        if not self._fine_tuning:
            check_norms(self.model, recorded)
            return
        ours = norm_record(self.model)
        differ = [
            f"{name}: {_describe(norm)} in the checkpoint, {_describe(ours[name])} here"
            for name, norm in (recorded or {}).items()
            if name in ours and ours[name] != norm
        ]
        if differ:
            logging.getLogger(__name__).warning(
                f"{len(differ)} norms start from weights trained with other groups or another weight "
                f"standardization than they have here, for instance {differ[0]}"
            )

    def _warn_of_batch_norms(self, batch_norms, missing_keys):
        taken = [
            (name, norm)
            for name, norm in self.model.named_modules()
            if isinstance(norm, nn.GroupNorm)
            and norm.affine
            and f"{name}.weight" not in missing_keys
            and any(name == suffix or name.endswith("." + suffix) or suffix == "" for suffix in batch_norms)
        ]
        if not taken:
            return
        frozen = sum(not norm.weight.requires_grad for _, norm in taken)
        logging.getLogger(__name__).warning(
            f"{len(taken)} GroupNorm layers ({taken[0][0]}, ...) took the weights of BatchNorm layers, {frozen} of "
            f"them are frozen that way by MODEL.BACKBONE.FREEZE_AT. They do not fit: a BatchNorm's weight and bias "
            f"belong to its running statistics. Set MODEL.WEIGHTS to weights trained with GroupNorm (for instance "
            f"catalog://ImageNetPretrained/FAIR/R-50-GN with MODEL.RESNETS.STRIDE_IN_1X1 False), or "
            f"MODEL.WEIGHTS '' with MODEL.BACKBONE.FREEZE_AT 0 to train from scratch."
        )


def norm_record(model: nn.Module) -> Dict[str, Dict]:
    """What a checkpoint keeps of each norm: ``num_groups`` (None for a batch norm), ``weight_standardized``."""
    kept = ("num_groups", "weight_standardized")
    return {row["name"]: {key: row[key] for key in kept} for row in norm_table(model)}


def check_norms(model: nn.Module, recorded: Optional[Dict[str, Dict]]) -> None:
    """Compare ``model`` with a checkpoint's record; None, from elsewhere, is taken as it is.

    Raises:
        InputError: a norm of one is not in the other, or is otherwise there. Norms of parts that ``model``
            lacks as a whole (a mask head, say) do not count.
    """
    differ = _differences(model, recorded) if recorded is not None else []
    if differ:
        more = [f"and {len(differ) - 10} more"] if len(differ) > 10 else []
        lines = "\n  ".join([*differ[:10], *more])
        raise InputError(
            f"the checkpoint was trained with other norms than this config has, {len(differ)} differ:\n  {lines}\n"
            f"Use the NORM keys that it was trained with (the config.yaml beside it)"
        )


def _differences(model, recorded):
    ours = norm_record(model)
    modules = {name for name, _ in model.named_modules()}
    names = [*ours, *(name for name in recorded if name not in ours and name.rpartition(".")[0] in modules)]
    return [
        f"{name}: {_describe(recorded.get(name))} in the checkpoint, {_describe(ours.get(name))} here"
        for name in names
        if recorded.get(name) != ours.get(name)
    ]


def _describe(norm):
    if norm is None:
        return "no norm"
    if norm["num_groups"] is None:
        return "a norm without groups"
    plural = "s" * (norm["num_groups"] > 1)
    return f"{norm['num_groups']} group{plural}" + " and WS" * norm["weight_standardized"]


def _batch_norms(checkpoint):
    """Names, as far as the file has them, of the BatchNorm layers in a checkpoint; "" stands for all layers."""
    keys = [key.removeprefix("module.") for key in checkpoint["model"]]
    if checkpoint.get("__author__") == "Caffe2":
        # Caffe2's names change on the way; its files hold one kind of norm: ..._bn_s or ..._gn_s
        return {""} if any("_bn_" in key for key in keys) else set()
    return {key[: -len(".running_mean")] for key in keys if key.endswith(".running_mean")}
