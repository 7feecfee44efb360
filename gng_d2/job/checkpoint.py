"""Checkpoints as Detectron2 writes and reads them, with a record of each norm's groups and checks for damage."""

import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _filter_reused_missing_keys
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gng_d2.errors import InputError, abbreviated, one_line
from gng_d2.layers import GroupNorm
from gng_d2.layers.binding import named_norms
from gng_d2.layers.kinds import num_channels, num_groups
from gng_d2.layers.record import describe_record, fits, put_records, records_of
from gng_d2.models.fold import fold_weight_standardization

from .build import bind_remaining_norms
from .config import check_weight_file
from .files import atomic_open
from .weight_files import read_weight_file, save_weight_file


class Checkpointer(DetectionCheckpointer):
    """:class:`detectron2.checkpoint.DetectionCheckpointer` that refuses damaged weights and weights of other norms.

    - A file appears under its name when it is whole, and any Detectron2 loads it. Reading a file compares its checksums
      and runs no code (:mod:`gng_d2.job.weight_files`).
    - GroupNorm weights fit any number of groups. So a checkpoint records each norm's groups, and whether its
      convolution is standardized (:mod:`gng_d2.layers.record`). Loading it into a model with other norms is an
      :class:`InputError`, and one warning where fine-tuning starts from it.
    - If a GroupNorm takes the weights of a BatchNorm (same names, same shapes, other meaning), there is one warning,
      and one if norms are new behind layers that were trained.
    - If the file that ``last_checkpoint`` names is damaged, a run resumes from the newest checkpoint that is whole.
    """

    missing_keys: Set[str] = frozenset()  # of the model, which the weights that were loaded last lack
    from_batch_norms: Sequence[str] = ()  # norms of the model that took the weights of batch norms
    _fine_tuning = False
    _whole = False  # whether the weights have to be those of this model, all of them
    _reading = ""

    def save(self, name, **kwargs):
        if not self.save_dir or not self.save_to_disk:
            return
        weights = _recorded_state_dict(self.model)
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        save_weight_file(path, {"model": weights, **parts, **kwargs})
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename):
        with atomic_open(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)

    def load(self, path, *args, **kwargs):
        if path and "://" in path:
            try:
                self.path_manager.get_local_path(path.split("?")[0])
            except Exception as error:  # each way of fetching raises its own
                raise InputError(f"the weights {path} cannot be fetched: {one_line(error)}") from error
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it after an error, and takes no other file then

    def resume_or_load(self, path, *, resume=True):
        """Go on from :meth:`find_checkpoint`. Without ``resume`` or a checkpoint, load the weights ``path``."""
        if resume and self.save_dir and self.save_to_disk:
            for partial in glob.glob(os.path.join(glob.escape(self.save_dir), "*.partial")):
                os.remove(partial)  # a run left it that was killed while it wrote a checkpoint
        if resume and self.has_checkpoint():
            return self.load(self.find_checkpoint()[0])
        self._fine_tuning = True
        try:
            return self.load(path, checkpointables=[])
        finally:
            self._fine_tuning = False

    def has_checkpoint(self):
        return super().has_checkpoint() or self._newest_whole() is not None

    def find_checkpoint(self) -> tuple[str, dict]:
        """The path and the content of the checkpoint to resume from. It is the one that ``last_checkpoint`` names, or
        where that is damaged the newest whole one, and then a warning says so.

        Raises:
            InputError: no checkpoint is whole; says what is wrong with the one that is named.
        """
        last = os.path.join(self.save_dir, "last_checkpoint")
        try:
            named = self.get_checkpoint_file() or last
            return named, self.read(named, to_resume=True)
        except (InputError, UnicodeDecodeError) as error:
            trouble = f"{last} names no whole checkpoint: {error}"
        newest = self._newest_whole()
        if newest is None:
            raise InputError(f"--resume: {trouble}, and no other checkpoint of {self.save_dir} is whole")
        self.logger.warning(f"{trouble}. Resuming from {newest[0]}, the newest checkpoint there that is whole")
        return newest

    def _newest_whole(self) -> tuple[str, dict] | None:
        newest = None
        for path in sorted(glob.glob(os.path.join(glob.escape(self.save_dir or os.devnull), "model_*.pth"))):
            if re.fullmatch(r"model_(\d{7,}|final)\.pth", os.path.basename(path)):
                with suppress(InputError):
                    checkpoint = self.read(path, to_resume=True)
                    if newest is None or checkpoint["iteration"] >= newest[1]["iteration"]:
                        newest = path, checkpoint
        return newest

    def read(self, path: str, to_resume: bool = False) -> dict:
        """The content of the local file ``path``; its weights are under the key ``model``.

        Raises:
            InputError: the file is damaged, would run code or is no checkpoint; or it is ``to_resume`` from, and holds
                weights alone.
        """
        filename, _, query = path.partition("?")
        self._reading = filename
        checkpoint = read_weight_file(filename)
        by_name = isinstance(checkpoint, Mapping)
        if by_name and filename.endswith(".pkl") and "model" not in checkpoint:
            # of Caffe2 if no name has a dot; its detectors have "blobs", its ImageNet models do not
            weights = {k: v for k, v in checkpoint.get("blobs", checkpoint).items() if not str(k).endswith("_momentum")}
            author = "an unknown author" if any("." in str(k) for k in weights) else "Caffe2"
            checkpoint = {"model": weights, "__author__": author, "matching_heuristics": True}
        elif by_name and filename.endswith(".pyth") and isinstance(checkpoint.get("model_state"), Mapping):
            weights = {k: v for k, v in checkpoint["model_state"].items() if not k.endswith("num_batches_tracked")}
            checkpoint = {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        elif not by_name or "model" not in checkpoint:
            checkpoint = {"model": checkpoint}
        if query == "matching_heuristics=True":
            checkpoint["matching_heuristics"] = True
        elif query:
            raise InputError(f"{filename}: its address ends in ?{query}; only ?matching_heuristics=True is known")
        weights = checkpoint["model"]
        if not isinstance(weights, dict) or not all(
            isinstance(k, str) and isinstance(v, (Tensor, np.ndarray)) for k, v in weights.items()
        ):
            raise InputError(
                f"{filename} holds no weights by name under 'model', as Detectron2's checkpoints do. "
                f"tools/convert_weights.py converts ResNets of torchvision, timm and mmdetection"
            )
        if not any("_orig_mod" in name.split(".") for name, _ in self.model.named_modules()):
            _name_as_uncompiled(weights)
        if to_resume:  # from a file that no trainer saved Detectron2 would go on at iteration 1
            parts = (checkpoint.get(key) for key in self.checkpointables)
            if type(checkpoint.get("iteration")) is not int or not all(isinstance(part, Mapping) for part in parts):
                raise InputError(f"{filename} holds weights alone and not what a run goes on from")
        return checkpoint

    def _load_file(self, filename):
        query = self._parsed_url_during_load.query
        return self.read(f"{filename}?{query}" if query else filename)

    def _load_model(self, checkpoint):
        if not self._fine_tuning:
            check_norms(self.model, checkpoint, self._reading)
        _check_kinds(self.model, checkpoint["model"], self._reading)
        suffixes = batch_norms(checkpoint)
        given = next(iter(checkpoint["model"]), "nothing")
        incompatible = super()._load_model(checkpoint)
        self.missing_keys = set(incompatible.missing_keys)
        names = {name for name, _ in self.model.named_parameters()}
        if names and names <= self.missing_keys:
            model_has = f"where the model has {next(iter(self.model.state_dict()))}"
            if incompatible.incorrect_shapes:
                given, found, wanted = incompatible.incorrect_shapes[0]
                given, model_has = f"{given} of shape {found}", f"not {wanted}"
            raise InputError(f"{self._reading} holds no weight of this model: it has {given}, {model_has}")
        trouble = _what_does_not_fit(self.model, incompatible) if self._whole else None
        if trouble:
            raise InputError(
                f"{self._reading} {trouble}. Use the config that the weights were trained with (the config.yaml beside "
                f"them)"
            )
        self.from_batch_norms = [
            name
            for name, norm in self.model.named_modules()
            if num_channels(norm) is not None
            and f"{name}.weight" not in self.missing_keys
            and any(name == suffix or name.endswith("." + suffix) or suffix == "" for suffix in suffixes)
        ]
        self._warn_of_batch_norms()
        self._warn_of_new_norms()
        return incompatible

    def _warn_of_batch_norms(self):
        taken = {name: self.model.get_submodule(name) for name in self.from_batch_norms}
        taken = {name: norm for name, norm in taken.items() if isinstance(norm, nn.GroupNorm) and norm.affine}
        if taken:
            frozen = sum(not norm.weight.requires_grad for norm in taken.values())
            logging.getLogger(__name__).warning(
                f"{len(taken)} GroupNorm layers ({abbreviated(taken, most=1)}) took the weights of BatchNorm layers, "
                f"which do not fit them, because a BatchNorm's affine belongs to its running statistics. "
                f"MODEL.BACKBONE.FREEZE_AT freezes {frozen} of them that way. They stay so unless they are calibrated "
                f"next: --calibrate-norms 64 of train_net.py and compare.py fits those of the backbone. Or start from "
                f"weights with GroupNorm (MODEL.WEIGHTS "
                f"catalog://ImageNetPretrained/FAIR/R-50-GN MODEL.RESNETS.STRIDE_IN_1X1 False), or from scratch "
                f"(MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0)"
            )

    def _warn_of_new_norms(self):
        new = [
            name
            for name, _, layer, _ in named_norms(self.model)
            if f"{name}.weight" in self.missing_keys and layer and f"{layer}.weight" not in self.missing_keys
        ]
        if new:
            logging.getLogger(__name__).warning(
                f"{len(new)} norms ({abbreviated(new, most=1)}) are not in {self._reading}, and the layers before them "
                f"are: they were trained without a norm, and a new one changes what the model computes. "
                f"Where you start from a whole model, keep the NORM keys with which it was trained"
            )


def _name_as_uncompiled(weights):
    """Leave out of the names of weights and records the parts that torch.compile puts there."""
    for names in (weights, getattr(weights, "_metadata", {})):
        for name in [name for name in names if "_orig_mod" in name.split(".")]:
            names[".".join(part for part in name.split(".") if part != "_orig_mod")] = names.pop(name)


def _check_kinds(model, weights, path):
    """PyTorch would copy integers without their scale, and the real part of complex numbers."""
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name in (name for name in weights if name.removeprefix("module.") in floats):
        value = torch.as_tensor(weights[name])
        dense = value.layout == torch.strided and not value.is_meta
        if not (value.is_floating_point() and dense):
            raise InputError(
                f"{path} holds {name} as {value.dtype}{', sparse or without values' * (not dense)}, and the model has "
                f"floating-point numbers there. Save the weights as those"
            )


def load_model(model: nn.Module, weights: str) -> nn.Module:
    """Load the file ``weights`` into ``model`` for inference: in eval mode, without gradients, with weight
    standardization folded.

    Raises:
        InputError: there is no such file, it lacks a weight of the model or has it in another shape, it is of a model
            with more layers, or a weight is not finite.
    """
    if not weights:
        raise InputError("no file of weights is given: the model would predict with weights that nobody trained")
    check_weight_file(weights, "weights")
    checkpointer = Checkpointer(bind_remaining_norms(model).eval())
    checkpointer._whole = True
    checkpointer.load(weights)
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"{weights}: weights are not finite: {abbreviated(broken)}. The training may have diverged")
    return fold_weight_standardization(model).requires_grad_(False)


def _what_does_not_fit(model, incompatible):
    """What is wrong with the weights if they are not those of ``model``, else None."""
    misshapen = [
        f"{name} ({theirs} there, {ours} in the model)" for name, theirs, ours in incompatible.incorrect_shapes
    ]
    if misshapen:
        return f"has weights of other shapes: {abbreviated(misshapen)}"
    # a layer that the model has under two names is in the file under one of them
    missing = _filter_reused_missing_keys(model, incompatible.missing_keys)
    missing = [name for name in incompatible.missing_keys if name in missing]  # in the order of the model
    if missing:
        return f"lacks {len(missing)} of the model's {len(model.state_dict())} weights: {abbreviated(missing)}"
    unknown = [key for key in incompatible.unexpected_keys if _belongs_to_another_layer(model, key)]
    if unknown:
        return f"is of another model, with layers that this one lacks: {abbreviated(unknown)}"
    return None


def _belongs_to_another_layer(model, key):
    """Whether the weight ``key``, which ``model`` lacks, is of a layer inside a part that ``model`` has.

    Then that part computed something else when it was trained. A whole part that the model lacks, such as a mask head,
    changes nothing in the other parts.
    """
    module = model
    for part in key.split("."):
        if module._modules.get(part) is None:
            break
        module = module._modules[part]
    if module is model or part == "num_batches_tracked" or getattr(module, part, None) is not None:
        return False
    own = {**module._parameters, **module._buffers}
    return bool(own) or isinstance(module, (nn.Sequential, nn.ModuleList))


def _recorded_state_dict(model):
    """The state dict, in which norms that are not ours have a record too: that of a BatchNorm says "no groups"."""
    weights = model.state_dict()
    others = {n: m for n, m in model.named_modules() if num_channels(m) is not None and not isinstance(m, GroupNorm)}
    put_records(weights, {n: {"num_groups": num_groups(m), "weight_standardized": False} for n, m in others.items()})
    return weights


def check_norms(model: nn.Module, checkpoint: Mapping, path: str) -> None:
    """Compare the norms of ``model`` with the record in the checkpoint at ``path``, if it has one.

    Parts that ``model`` lacks as a whole (a mask head, say) and norms that have not met their layers are not compared.

    Raises:
        InputError: a norm is in only one of the two, or has other groups there, or is standardized in only one.
    """
    there = {name.removeprefix("module."): record for name, record in records_of(checkpoint["model"]).items()}
    if not there:
        return
    here, modules = records_of(_recorded_state_dict(model)), dict(model.named_modules())
    with_weights = {key.removeprefix("module.").rpartition(".")[0] for key in checkpoint["model"]}
    differ = []
    for name in {**here, **there}:
        if name in here and name in there:
            unbound = isinstance(modules[name], GroupNorm) and here[name]["num_groups"] is None
            same = unbound or fits(there[name], here[name])
        elif name in here:
            same = name in with_weights or not modules[name].state_dict()
        else:
            same = name.rpartition(".")[0] not in modules
        if not same:
            differ.append(
                f"{name}: {describe_record(there.get(name))} in the checkpoint, {describe_record(here.get(name))} here"
            )
    if differ:
        lines = "\n  ".join(differ[:10])
        raise InputError(
            f"the checkpoint was trained with other norms than this config has, {len(differ)} differ"
            f"{', the first ten' * (len(differ) > 10)}:\n  {lines}\n"
            f"Use the NORM keys that {path} was trained with (the config.yaml beside it)"
        )


def check_resumed(model: nn.Module, checkpoint: Mapping, path: str) -> None:
    """See that a training of ``model`` can go on from the weights in the checkpoint at ``path``.

    Raises:
        InputError: a weight has another shape there.
    """
    there = checkpoint["model"]
    weights = [(n, w) for n, w in model.named_parameters() if n in there and not is_lazy(w)]
    differ = [
        f"{name} ({tuple(there[name].shape)} there, {tuple(weight.shape)} here)"
        for name, weight in weights
        if there[name].shape != weight.shape
    ]
    if differ:
        raise InputError(
            f"--resume: {path} is of another model than this config's: {abbreviated(differ)}. Use the config that the "
            f"run began with (the config.yaml beside it)"
        )


def batch_norms(checkpoint: Mapping) -> set[str]:
    """The names of the BatchNorm layers in a checkpoint, as far as the file has them; "" stands for all layers."""
    keys = [key.removeprefix("module.") for key in checkpoint["model"]]
    if checkpoint.get("__author__") == "Caffe2":
        # Caffe2's names change when they are loaded. A file of it has one kind of norm: ..._bn_s or ..._gn_s
        return {""} if any("_bn_" in key for key in keys) else set()
    return {key[: -len(".running_mean")] for key in keys if key.endswith(".running_mean")}
