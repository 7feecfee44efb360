"""Load a config, a YAML or a lazy (Python) one, and refuse values with which a run could not finish.

Reading a lazy config runs it. Every refusal is an :class:`~gng_d2.errors.InputError` that names the key or file and
says how to mend it.
"""

import copy
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from gng_d2.errors import InputError, one_line

from .weight_files import files_are_trusted

Config = CfgNode | DictConfig


def load_config(config_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """The config of :func:`read_config`. On a machine without CUDA its ``MODEL.DEVICE`` becomes cpu."""
    cfg = read_config(config_file, overrides)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).info("no CUDA device here: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def read_config(config_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """A YAML config: Detectron2's defaults, changed by ``config_file`` and then by ``overrides``.

    Args:
        config_file: a path, or a name in Detectron2's model zoo.
        overrides: words, KEY VALUE KEY VALUE ...

    Raises:
        InputError: a file or a pair cannot be used, or a file has Python tags (:class:`_JudgedConfig`).
    """
    if config_file.endswith(".py"):
        raise InputError(
            f"config file {config_file} is a lazy (Python) config. Detectron2's lazyconfig_train_net.py trains it; "
            f"norm names are the same there, after `import gng_d2` in it or in the config"
        )
    cfg = get_cfg()
    vars(cfg)["load_yaml_with_base"] = _JudgedConfig.load_yaml_with_base  # what merge_from_file reads files by
    try:
        cfg.merge_from_file(find_config_file(config_file))
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"config file {config_file}: its _BASE_ leads back to itself") from None
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"config file {config_file} is no YAML config: it, its _BASE_ or a section such as MODEL is empty, or has "
            f"values without keys"
        ) from error
    except Exception as error:  # PyYAML, yacs and Detectron2 raise a dozen kinds
        raise InputError(f"config file {config_file} cannot be used: {one_line(error)}{_own_keys(error)}") from error
    finally:
        vars(cfg).pop("load_yaml_with_base", None)
    try:
        cfg.merge_from_list(list(overrides))
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise InputError(
            f"config overrides {' '.join(overrides)!r}: {one_line(error)}. Give pairs, KEY VALUE, with keys that the "
            f"config has{_own_keys(error)}"
        ) from error
    return cfg


def _own_keys(error):
    return (
        ". Keys of your own project have to be among Detectron2's defaults: a file that --import runs adds them to "
        "detectron2.config.defaults._C"
    ) * ("Non-existent" in str(error))


def load_any_config(config_file: str, overrides: Sequence[str] = ()) -> Config:
    """A lazy config, which is run, if ``config_file`` ends in .py, else a YAML config that is checked.

    Args:
        config_file: a path, or a name in Detectron2's model zoo.
        overrides: of a YAML config words KEY VALUE KEY VALUE ..., of a lazy one words path.key=value.

    Raises:
        InputError: the file or an override cannot be used, or a lazy config has no ``model``.
    """
    if not config_file.endswith(".py"):
        cfg = load_config(config_file, overrides)
        check_config(cfg)
        return cfg
    try:
        cfg = LazyConfig.load(find_config_file(config_file))
    except SyntaxError as error:  # where Detectron2 says which file it is, its cause says what is wrong
        raise InputError(f"config file {config_file}: {error} {error.__cause__ or ''}".strip()) from error
    try:
        LazyConfig.apply_overrides(cfg, list(overrides))
    except Exception as error:  # Hydra's and OmegaConf's have no base of their own
        raise InputError(
            f"config overrides {' '.join(overrides)!r}: {one_line(error)}. A lazy config takes "
            f"path.key=value, such as model.backbone.norm=PGN"
        ) from error
    if not isinstance(cfg.get("model"), DictConfig) or "_target_" not in cfg.model:
        raise InputError(
            f"config file {config_file} has no `model` that is a LazyCall, as those of Detectron2's "
            f"configs/common/models are. It has {', '.join(cfg) or 'nothing'}"
        )
    return cfg


class _JudgedConfig(CfgNode):
    """Reads a YAML file and the files of its ``_BASE_``, and refuses Python tags in each that is not in the model zoo.

    A Python tag (``!!python/object/apply:...``) runs code on reading. Base-RetinaNet.yaml of Detectron2's model zoo has
    one. In other folders a tag is read only if files are trusted.
    """

    @classmethod
    def load_yaml_with_base(cls, filename, allow_unsafe=False):
        with PathManager.open(filename) as file:
            if re.search(r"^[^#\n]*\b_target_:", file.read(), re.MULTILINE):
                raise InputError(
                    f"config file {filename} is a lazy (Python) config that was saved as YAML. Give the .py file from "
                    f"which it was made"
                )
        zoo = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
        inside = os.path.realpath(filename).startswith(os.path.realpath(zoo) + os.sep)
        try:
            return super().load_yaml_with_base(filename, allow_unsafe=inside or files_are_trusted())
        except yaml.constructor.ConstructorError as error:
            if "tag:yaml.org,2002:python/" not in str(error):
                raise
            tag = str(error.problem).partition("tag:yaml.org,2002:")[2].strip("'")
            raise InputError(
                f"config file {filename} has the Python tag !!{tag}, which would run code on reading. Nothing of it "
                f"was run. Write its value in its place; or, where you trust the file, --trust-files opens it"
            ) from None


def find_config_file(config_file: str) -> str:
    """The path of ``config_file``, which is a path or a name in Detectron2's model zoo."""
    if not config_file:
        raise InputError("no config file: give --config-file FILE")
    if os.path.isfile(config_file):
        return config_file
    try:
        return model_zoo.get_config_file(config_file)
    except RuntimeError:
        raise InputError(f"config file {config_file} does not exist, here or in Detectron2's model zoo") from None


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of each value in a config or another tree of dicts and lists, such as ("MODEL.DEVICE", "cpu").

    A list in a :class:`CfgNode` is a value.
    """
    nodes = CfgNode if isinstance(tree, CfgNode) else (dict, list)
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, nodes):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def norm_keys(cfg: Config) -> Iterator[tuple[str, str]]:
    """(key, value) of each key for a norm's name, such as ("MODEL.FPN.NORM", "PGN"), ("model.backbone.norm", "PGN")."""
    if isinstance(cfg, CfgNode):
        return ((key, value or "") for key, value in leaves(cfg) if key.endswith(".NORM"))
    try:
        found = leaves(OmegaConf.to_container(cfg.model, resolve=True), "model.")
    except OmegaConfBaseException as error:  # of a ${...} that leads nowhere
        raise InputError(f"the config's model: {one_line(error)}") from error
    return ((key, value) for key, value in found if isinstance(value, str) and key.endswith((".norm", "_norm")))


def with_value(cfg: Config, key: str, value: str) -> Config:
    """A copy of ``cfg`` in which ``key`` is ``value``."""
    if isinstance(cfg, CfgNode):
        changed = cfg.clone()
        changed.defrost()
        changed.merge_from_list([key, value])
        return changed
    changed = copy.deepcopy(cfg)
    OmegaConf.update(changed, key, value)
    return changed


def check_config(cfg: CfgNode, world_size: int = 1) -> None:
    """See that the numbers of images and steps, and the device, are such that ``world_size`` processes can train.

    Raises:
        InputError: names the key.
    """
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise InputError(f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is no device: cpu, cuda, cuda:1 are") from None
    for key in ("IMS_PER_BATCH", "MAX_ITER", "CHECKPOINT_PERIOD"):  # without images Detectron2 waits for ever
        if cfg.SOLVER[key] < 1:
            raise InputError(f"SOLVER.{key} {cfg.SOLVER[key]}: at least 1")
    images, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if images % (reference or max(world_size, 1)):
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {images} does not divide among "
            + (f"SOLVER.REFERENCE_WORLD_SIZE {reference}" if reference else f"{world_size} processes")
            + ". Set it to a multiple; SOLVER.REFERENCE_WORLD_SIZE scales a schedule to fewer or more processes"
        )


def check_solver(cfg: CfgNode) -> None:
    """See that Detectron2 can make the optimizer and the schedule of a training.

    Raises:
        InputError: says why not.
    """
    try:
        build_lr_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1)))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the optimizer and its schedule cannot be made from the section SOLVER: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error


def check_weights(cfg: CfgNode) -> None:
    """See that the file MODEL.WEIGHTS exists, and warn of a FrozenBN that gets no weights."""
    check_weight_file(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    if not cfg.MODEL.WEIGHTS and cfg.MODEL.RESNETS.NORM == "FrozenBN" and "resnet" in cfg.MODEL.BACKBONE.NAME:
        logging.getLogger(__name__).warning(
            "MODEL.WEIGHTS '' with MODEL.RESNETS.NORM FrozenBN: without weights a FrozenBN normalizes nothing, and "
            "training will likely diverge. From scratch, set MODEL.RESNETS.NORM PGN and MODEL.BACKBONE.FREEZE_AT 0"
        )


def check_weight_file(path: str, source: str) -> None:
    """Raise an InputError where there is no file ``path``. It names ``source``, by which the user gave the path."""
    path = path.split("?")[0]
    if path and "://" not in path and not PathManager.isfile(path):
        scratch = ". MODEL.WEIGHTS '' starts from scratch" if source == "MODEL.WEIGHTS" else ""
        raise InputError(f"{source}: the file {path} does not exist{scratch}")
