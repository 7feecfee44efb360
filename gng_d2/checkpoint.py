"""Detectron2's checkpointer, which knows the groups that its weights were trained with."""

import logging
import pickle
import zipfile

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .analysis import norm_table
from .errors import InputError

__all__ = ["Checkpointer"]


# what pickle, zipfile and torch.load raise for a file that is none of theirs, or cut
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError,
    AttributeError, AssertionError, ImportError, IndexError,
)  # fmt: skip


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
        super().save(name, norms=_norm_record(self.model), **kwargs)

    def resume_or_load(self, path, *, resume=True):
        self._fine_tuning = not (resume and self.has_checkpoint())
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._fine_tuning = False

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
        self._compare_norms(checkpoint.pop("norms", {}))
        batch_norms = _batch_norms(checkpoint)
        incompatible = super()._load_model(checkpoint)
        self._warn_of_batch_norms(batch_norms, set(incompatible.missing_keys))
        return incompatible

    def _compare_norms(self, recorded):
        ours = _norm_record(self.model)
        differ = [
            f"{name}: {_describe(recorded[name])} in the checkpoint, {_describe(norm)} here"
            for name, norm in ours.items()
            if name in recorded and recorded[name] != norm
        ]
        if not differ:
            return
        if self._fine_tuning:
            logging.getLogger(__name__).warning(
                f"{len(differ)} of {len(ours)} norms start from weights trained with other groups or without the "
                f"weight standardization that they have here, for instance {differ[0]}"
            )
            return
        more = f"\n  and {len(differ) - 10} more" if len(differ) > 10 else ""
        raise InputError(
            f"the checkpoint was trained with other norms than this config has, {len(differ)} of {len(ours)} differ:\n  "
            + "\n  ".join(differ[:10])
            + f"{more}\nUse the NORM keys that it was trained with (the config.yaml beside it)"
        )

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
            f"catalog://ImageNetPretrained/FAIR/R-50-GN with MODEL.RESNETS.STRIDE_IN_1X1 False), or "
            f"MODEL.WEIGHTS '' with MODEL.BACKBONE.FREEZE_AT 0 to train from scratch."
        )


def _norm_record(model):
    return {
        row["name"]: {"num_groups": row["num_groups"], "weight_standardized": row["weight_standardized"]}
        for row in norm_table(model)
        if row["num_groups"] is not None
    }


def _describe(norm):
    plural = "s" * (norm["num_groups"] > 1)
    return f"{norm['num_groups']} group{plural}" + " and WS" * norm["weight_standardized"]


def _batch_norms(checkpoint):
    """Names, as far as the file has them, of the BatchNorm layers in a checkpoint; "" stands for all layers."""
    keys = checkpoint["model"].keys()
    if checkpoint.get("__author__") == "Caffe2":
        # Caffe2's names change on the way; its files hold one kind of norm: ..._bn_s or ..._gn_s
        return {""} if any("_bn_" in key for key in keys) else set()
    return {key[: -len(".running_mean")] for key in keys if key.endswith(".running_mean")}
