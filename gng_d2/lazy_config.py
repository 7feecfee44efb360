"""Configs of either of Detectron2's kinds, for the tools that take both: YAML, and lazy ones, which are Python.

Reading a lazy config runs it. What a tool asks of a config of either kind has one function each.
"""

import copy
import difflib
import inspect
import logging
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from . import config
from .data import checks
from .errors import InputError
from .layers.binding import build_naming_norms

__all__ = ["PredictionSettings", "build", "check_test_classes", "load_any_config", "norm_keys", "prediction_settings"]
__all__ += ["with_value"]

Config = Union[CfgNode, DictConfig]

# where lazy configs of Detectron2 say how many classes their model has
_NUM_CLASSES = {
    "model.roi_heads.num_classes": "thing_classes",
    "model.num_classes": "thing_classes",
    "model.sem_seg_head.num_classes": "stuff_classes",
}


def load_any_config(config_file: str, overrides: Sequence[str] = ()) -> Config:
    """A checked config: a lazy one, which is run, from a .py file, else a YAML one.

    Args:
        config_file: a path, or a name in Detectron2's model zoo.
        overrides: ``KEY VALUE`` pairs of words for a YAML config, words ``path.key=value`` for a lazy one.

    Raises:
        InputError: the file or an override cannot be used, or a lazy config has no ``model``.
    """
    if not config_file.endswith(".py"):
        cfg = config.load_config(config_file, overrides)
        config.check_config(cfg)
        return cfg
    try:
        cfg = LazyConfig.load(config.find_config_file(config_file))
    except SyntaxError as error:
        if error.__cause__:  # Detectron2 says which file, and Python why
            raise InputError(f"{error} {error.__cause__}") from error
        raise InputError(f"config file {config_file}: {error}") from error
    for word in overrides:
        _override(cfg, word)
    if not isinstance(cfg.get("model"), DictConfig) or "_target_" not in cfg.model:
        raise InputError(
            f"config file {config_file} has no `model` that is a LazyCall, as those of Detectron2's "
            f"configs/common/models are. It has {', '.join(cfg) or 'nothing'}"
        )
    return cfg


def _override(cfg, word):
    key, equals, _ = word.partition("=")
    if not equals:
        raise InputError(
            f"config override {word!r}: a lazy config takes path.key=value, such as model.backbone.norm=PGN, "
            f"not KEY VALUE pairs"
        )
    node, parts = cfg, key.removeprefix("+").split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        names = _names(node, of_call=last)
        if names is None or last and key.startswith("+"):  # Hydra's sign of a new key
            break
        if part not in names:
            near = difflib.get_close_matches(part, names, 1)
            raise InputError(
                f"config override {word!r}: there is no {part!r} in {'.'.join(parts[:depth]) or 'the config'}"
                + (f"; did you mean {near[0]!r}?" if near else f". It has {', '.join(names) or 'nothing below it'}")
            )
        node = node[int(part)] if isinstance(node, ListConfig) else node.get(part)
    try:
        LazyConfig.apply_overrides(cfg, [word])
    except Exception as error:  # Hydra's and OmegaConf's have no base of their own
        raise InputError(f"config override {word!r}: {str(error).splitlines()[0]}") from error


def _names(node, of_call):
    """What can be set below ``node``, for a call also the arguments that it leaves out; None: anything."""
    if isinstance(node, ListConfig):
        return [str(index) for index in range(len(node))]
    if not isinstance(node, DictConfig):
        return []
    if not of_call or "_target_" not in node:
        return list(node)
    target = node._target_
    try:
        parameters = inspect.signature(locate(target) if isinstance(target, str) else target).parameters
    except (TypeError, ValueError):  # of a class in C
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return list(dict.fromkeys([*node, *(name for name in parameters if name != "self")]))


def norm_keys(cfg: Config) -> Iterator[Tuple[str, str]]:
    """(key, value) of each name of a norm, such as ("MODEL.FPN.NORM", "PGN") or ("model.backbone.norm", "PGN")."""
    if isinstance(cfg, CfgNode):
        return config.norm_keys(cfg)
    return _lazy_norm_keys(OmegaConf.to_container(cfg.model), "model")


def _lazy_norm_keys(node, path):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            yield from _lazy_norm_keys(value, f"{path}.{key}")
        elif isinstance(value, str) and (key == "norm" or str(key).endswith("_norm")):
            yield f"{path}.{key}", value


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


def build(cfg: Config, device: Optional[str] = None) -> nn.Module:
    """The model of ``cfg`` with fresh weights.

    Args:
        device: None: the config's own, MODEL.DEVICE or train.device, or the CPU where there is no CUDA.

    Raises:
        InputError: it cannot be built.
    """
    try:
        if isinstance(cfg, CfgNode):
            return build_naming_norms(build_model, with_value(cfg, "MODEL.DEVICE", device) if device else cfg)
        return build_naming_norms(instantiate, cfg.model).to(device or _device(cfg))
    except InputError as error:
        unknown = [key for key, value in norm_keys(cfg) if str(error).startswith(f"unknown norm {value!r}")]
        raise InputError(f"{unknown[0]}: {error}" if unknown else str(error)) from error
    except Exception as error:  # of any kind: it runs every constructor that the config names
        raise InputError(f"the model of this config cannot be built: {type(error).__name__}: {error}") from error


def _device(cfg):
    device = str(OmegaConf.select(cfg, "train.device") or "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).info("no CUDA device here: train.device is cpu")
        return "cpu"
    return device


class PredictionSettings(NamedTuple):
    """How a config says that images are read and what its model's classes are."""

    dataset: Optional[str]  # the first to test on, whose metadata names the classes
    dataset_key: str  # where the config says so
    num_classes: Dict[str, int]  # of the model: "thing_classes" and "stuff_classes"
    image_format: str  # of PIL, or BGR
    augmentations: List[T.Augmentation]  # of an image to test on, which resize it


def prediction_settings(cfg: Config) -> PredictionSettings:
    """Raises: InputError: a lazy config has no dataloader.test.mapper that says how images are read."""
    if isinstance(cfg, CfgNode):
        num_classes = {"thing_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}
        num_classes["stuff_classes"] = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        num_classes.update({field: number for _, number, field in checks.learned_classes(cfg)})
        resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        dataset = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else None
        return PredictionSettings(dataset, "DATASETS.TEST", num_classes, cfg.INPUT.FORMAT, [resize])
    mapper = OmegaConf.select(cfg, "dataloader.test.mapper")
    if not mapper or "augmentations" not in mapper or "image_format" not in mapper:
        raise InputError(
            "the lazy config has no dataloader.test.mapper with image_format and augmentations, which say how images "
            "are read and resized for its model. Detectron2's configs/common/data/coco.py has one"
        )
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names") or []
    dataset = names if isinstance(names, str) else next(iter(names), None)
    num_classes = {field: number for _, number, field in _lazy_learned(cfg)}
    augmentations = list(instantiate(mapper.augmentations))
    return PredictionSettings(dataset, "dataloader.test.dataset.names", num_classes, mapper.image_format, augmentations)


def _lazy_learned(cfg):
    found = {key: OmegaConf.select(cfg, key) for key in _NUM_CLASSES}
    return [(key, number, _NUM_CLASSES[key]) for key, number in found.items() if isinstance(number, int)]


def check_test_classes(cfg: Config, settings: PredictionSettings) -> None:
    """Raises: InputError: the dataset to test on has more classes than the model, or others; names key and numbers."""
    if isinstance(cfg, CfgNode):
        checks.check_classes(cfg, eval_only=True)
    elif settings.dataset is not None:
        for key, number, field in _lazy_learned(cfg):
            known = MetadataCatalog.get(settings.dataset).get(field)
            if known is not None:
                checks.compare(key, number, field, settings.dataset, len(known))
