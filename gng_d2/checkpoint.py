"""Detectron2's checkpointer, which says what it cannot read and what does not fit a GroupNorm."""

import logging
import pickle
import zipfile

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .errors import InputError

__all__ = ["Checkpointer"]


# what pickle, zipfile and torch.load raise for a file that is none of theirs, or cut
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError,
    AttributeError, AssertionError, ImportError, IndexError,
)  # fmt: skip


class Checkpointer(DetectionCheckpointer):
    """:class:`detectron2.checkpoint.DetectionCheckpointer` with two more checks.

    A file that is no checkpoint is an :class:`InputError` with its name. BatchNorm weights that arrive
    in a GroupNorm (same names, same shapes, other meaning) are one warning.
    """

    def _load_file(self, filename):
        try:
            return super()._load_file(filename)
        except (FileNotFoundError, PermissionError):
            raise
        except UNREADABLE as error:
            raise InputError(
                f"MODEL.WEIGHTS: {filename} cannot be read as a checkpoint ({type(error).__name__}: {error}). "
                f"Is the download whole? A run's own last checkpoint is named in its last_checkpoint file"
            ) from error

    def _load_model(self, checkpoint):
        batch_norms = _batch_norms(checkpoint)
        incompatible = super()._load_model(checkpoint)
        self._warn_of_batch_norms(batch_norms, set(incompatible.missing_keys))
        return incompatible

    def _warn_of_batch_norms(self, batch_norms, missing_keys):
        taken = [
            (name, norm)
            for name, norm in self.model.named_modules()
            if isinstance(norm, nn.GroupNorm) and norm.affine and f"{name}.weight" not in missing_keys
            and any(name == suffix or name.endswith("." + suffix) or suffix == "" for suffix in batch_norms)
        ]
        if not taken:
            return
        frozen = sum(not norm.weight.requires_grad for _, norm in taken)
        logging.getLogger(__name__).warning(
            f"{len(taken)} GroupNorm layers ({taken[0][0]}, ...) took the weights of BatchNorm layers, {frozen} of "
            f"them are frozen that way by MODEL.BACKBONE.FREEZE_AT. They do not fit: a BatchNorm's weight and bias "
            f"belong to its running statistics. Set MODEL.WEIGHTS to weights trained with GroupNorm (for instance "
            f"detectron2://ImageNetPretrained/FAIR/R-50-GN.pkl with MODEL.RESNETS.STRIDE_IN_1X1 False), or "
            f"MODEL.WEIGHTS '' with MODEL.BACKBONE.FREEZE_AT 0 to train from scratch."
        )


def _batch_norms(checkpoint):
    """Names, as far as the file has them, of the BatchNorm layers in a checkpoint; "" stands for all layers."""
    keys = checkpoint["model"].keys()
    if checkpoint.get("__author__") == "Caffe2":
        # Caffe2's names change on the way; its files hold one kind of norm: ..._bn_s or ..._gn_s
        return {""} if any("_bn_" in key for key in keys) else set()
    return {key[: -len(".running_mean")] for key in keys if key.endswith(".running_mean")}
