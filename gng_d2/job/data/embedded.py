"""Draw the embedded dataset "gng_shapes", and register it with Detectron2 under these names:

===============================  =======================================================
``gng_shapes_{split}``           things with boxes and masks, evaluated as COCO instances
``gng_shapes_{split}_separated`` panoptic, as ``coco_2017_{split}_panoptic_separated``
``gng_shapes_{split}_stuffonly`` semantic
===============================  =======================================================

with the splits train and val.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from detectron2.data.datasets import register_coco_instances, register_coco_panoptic_separated
from tqdm import tqdm

from gng_d2.errors import InputError

from .coco_format import split_files, write_split
from .shapes import STUFF, THINGS, draw_scene

NAME = "gng_shapes"
SPLITS = {"train": 800, "val": 100}  # images
SEED = 2024


def datasets_root() -> Path:
    """Detectron2's dataset root: ``$DETECTRON2_DATASETS``, or ``datasets`` in the working directory."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def draw(root: Path, splits=SPLITS) -> None:
    """Draw the dataset into the folder ``gng_shapes`` of ``root``, which appears when it is whole."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=root) as unfinished:
            folder = Path(unfinished) / NAME
            for index, (split, count) in enumerate(splits.items()):
                numbers = tqdm(range(count), desc=f"drawing {NAME} {split}", unit="image")
                scenes = (draw_scene(np.random.default_rng([SEED, index, number])) for number in numbers)
                write_split(folder, split, scenes, THINGS, STUFF)
            try:
                os.rename(folder, root / NAME)
            except OSError:
                if not (root / NAME).is_dir():  # else another process drew the same in the meantime
                    raise
    except OSError as error:
        raise InputError(
            f"cannot write the embedded dataset to {root / NAME}: {error.strerror}. Set DETECTRON2_DATASETS "
            f"to a folder that can be written"
        ) from error


def draw_if_missing() -> None:
    """Draw the dataset into Detectron2's dataset root if it is not there."""
    if not (datasets_root() / NAME).is_dir():
        draw(datasets_root())


def metadata() -> dict:
    """What Detectron2 keeps for a separated panoptic dataset: contiguous ids, names, colours."""
    stuff_ids = range(len(THINGS) + 1, len(THINGS) + len(STUFF) + 1)
    return {
        "thing_classes": list(THINGS),
        "thing_colors": [(255, 90, 60), (255, 190, 0), (0, 140, 255), (230, 0, 160), (120, 60, 255)],
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(THINGS))},
        "stuff_classes": ["things", *STUFF],
        "stuff_colors": [(90, 90, 90), (70, 160, 110), (170, 150, 90), (120, 170, 200)],
        "stuff_dataset_id_to_contiguous_id": {0: 0, **{k: i for i, k in enumerate(stuff_ids, 1)}},
    }


def _register():
    for split in SPLITS:
        name = f"{NAME}_{split}"
        files = {key: str(path) for key, path in split_files(datasets_root() / NAME, split).items()}
        register_coco_panoptic_separated(name, metadata(), **files)
        things = {key: metadata()[key] for key in ("thing_classes", "thing_colors")}
        register_coco_instances(name, things, files["instances_json"], files["image_root"])


_register()
