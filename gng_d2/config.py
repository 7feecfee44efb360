"""Load a config and refuse, before any work, what a run could not finish with.

Every refusal is an :class:`~gng_d2.errors.InputError` that names the key, file or folder and the mend.
"""

import difflib
import importlib.util
import logging
import os
import tempfile
from typing import Iterator, Sequence, Tuple

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import get_norm
from detectron2.utils.file_io import PathManager

from .data import embedded
from .errors import InputError

__all__ = [
    "find_config_file",
    "load_config",
    "norm_keys",
    "check_config",
    "check_datasets",
    "check_weights",
    "check_output_dir",
]


def load_config(config_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults, then ``config_file`` (a path, or a name in the model zoo), then ``KEY VALUE`` pairs.

    On a machine without CUDA ``MODEL.DEVICE`` becomes cpu.
    """
    cfg = get_cfg()
    try:
        cfg.merge_from_file(find_config_file(config_file))
    except FileNotFoundError as error:
        raise InputError(f"config file {config_file}: {error.filename or error} does not exist") from error
    except RecursionError as error:
        raise InputError(f"config file {config_file}: its _BASE_ leads back to itself") from error
    except OSError as error:
        raise InputError(f"config file {config_file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise InputError(f"config file {config_file} is no YAML config: {error}") from error
    except (KeyError, ValueError, AssertionError) as error:
        raise InputError(f"config file {config_file}: {_message(error)}") from error
    try:
        cfg.merge_from_list(list(overrides))
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise InputError(
            f"config overrides {' '.join(overrides)!r}: {_message(error)}. They are pairs, KEY VALUE, of keys "
            f"that Detectron2's config has"
        ) from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).info("no CUDA device here: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def find_config_file(config_file: str) -> str:
    """``config_file`` itself, or where it is in Detectron2's model zoo."""
    if config_file.endswith(".py"):
        raise InputError(
            f"config file {config_file} is a lazy (Python) config. Add `import gng_d2` to Detectron2's "
            f"lazyconfig_train_net.py; norm names are the same there"
        )
    if not config_file:
        raise InputError("no config file: give --config-file FILE")
    if os.path.isfile(config_file):
        return config_file
    try:
        return model_zoo.get_config_file(config_file)
    except RuntimeError:
        raise InputError(f"config file {config_file} does not exist, here or in Detectron2's model zoo") from None


def _message(error):
    return str(error.args[0]) if error.args else type(error).__name__


def norm_keys(cfg: CfgNode, prefix: str = "") -> Iterator[Tuple[str, str]]:
    """(key, value) of each ``NORM`` of a config, for instance ("MODEL.FPN.NORM", "PGN")."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from norm_keys(value, f"{prefix}{key}.")
        elif key == "NORM":
            yield f"{prefix}{key}", value


def check_config(cfg: CfgNode, world_size: int = 1) -> None:
    for key, value in norm_keys(cfg):
        try:
            get_norm(value, 32)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
    images, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if images % (reference or max(world_size, 1)):
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {images} does not divide among "
            + (f"SOLVER.REFERENCE_WORLD_SIZE {reference}" if reference else f"{world_size} processes")
            + ". Set it to a multiple; SOLVER.REFERENCE_WORLD_SIZE scales a schedule to fewer or more processes"
        )


# where Detectron2's registrations keep what they read
_PATHS = ("image_root", "json_file", "panoptic_json", "panoptic_root", "sem_seg_root", "image_dir", "gt_dir", "dirname")


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Every dataset of the config is registered and there; the embedded one is drawn if it is missing."""
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            _check_dataset(f"DATASETS.{key}", name)


def _check_dataset(key, name):
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list(), 1, 0.0)[0]
        raise InputError(f"{key}: no dataset named {name!r} is registered; did you mean {near!r}?")
    if name.startswith(embedded.NAME):
        embedded.draw_if_missing()
    metadata = MetadataCatalog.get(name)
    for field in _PATHS:
        path = metadata.get(field)
        if path and not PathManager.exists(path):
            raise InputError(
                f"{key}: the {field} of dataset {name!r} is not there: {path}. Datasets are looked for in "
                f"{embedded.datasets_root().resolve()}; the environment variable DETECTRON2_DATASETS sets that folder"
            )
    if key == "DATASETS.TEST" and metadata.get("evaluator_type") == "coco_panoptic_seg":
        if importlib.util.find_spec("panopticapi") is None:
            raise InputError(f"{key}: to evaluate {name!r}, install panopticapi: pip install panopticapi-lite")


def check_weights(cfg: CfgNode) -> None:
    path = cfg.MODEL.WEIGHTS.split("?")[0]
    if path and "://" not in path and not PathManager.isfile(path):
        raise InputError(f"MODEL.WEIGHTS: the file {path} does not exist. MODEL.WEIGHTS '' starts from scratch")
    if not path and cfg.MODEL.RESNETS.NORM == "FrozenBN" and "resnet" in cfg.MODEL.BACKBONE.NAME:
        logging.getLogger(__name__).warning(
            "MODEL.WEIGHTS '' with MODEL.RESNETS.NORM FrozenBN: without weights a FrozenBN normalizes nothing, and "
            "training will likely diverge. From scratch, set MODEL.RESNETS.NORM PGN and MODEL.BACKBONE.FREEZE_AT 0"
        )


def check_output_dir(cfg: CfgNode) -> None:
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR):
            pass
    except OSError as error:
        raise InputError(f"OUTPUT_DIR: cannot write to {cfg.OUTPUT_DIR!r}: {error.strerror}") from error
