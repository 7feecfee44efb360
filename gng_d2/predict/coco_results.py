"""Predictions in COCO's formats, as pycocotools and panopticapi read them."""

import itertools
import json
import logging
import os
from collections.abc import Sequence

import numpy as np
import pycocotools.mask
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from gng_d2.errors import InputError
from gng_d2.job.files import atomic_open

from .predictions import save_png
from .settings import PredictionSettings

__all__ = ["CocoResults", "class_metadata", "image_ids"]


def class_metadata(settings: PredictionSettings, with_records: bool) -> tuple[Metadata, list[dict]]:
    """The metadata of the dataset to test on, which names the classes, and the dataset's records.

    There are no records if ``with_records`` is False or the dataset's files are missing. Where the config has no
    dataset, the classes are named by their numbers.

    Raises:
        InputError: the dataset is not registered, or the file that names its classes cannot be read.
    """
    name, key = settings.dataset, settings.dataset_key
    if name is None:
        return _numbered(settings.num_classes), []
    mend = f"{key}{' ()' if key.isupper() else '=[]'} calls the classes by their numbers"
    if name not in DatasetCatalog:
        raise InputError(
            f"{key}: no dataset named {name!r} is registered, so the names of the classes are not known. "
            f"--import takes the module that registers it; {mend}"
        )
    metadata = MetadataCatalog.get(name)
    named = metadata.get("thing_classes") or metadata.get("stuff_classes")
    if named and not with_records:
        return metadata, []
    try:
        return metadata, DatasetCatalog.get(name)
    except (OSError, AssertionError) as error:
        if not named:
            raise InputError(
                f"{key}: the files of {name!r}, which name the classes, cannot be read: {error}. {mend}"
            ) from error
        logging.getLogger(__name__).warning(
            f"the files of dataset {name!r} cannot be read ({error}). So images get numbers as ids, and so do "
            f"categories if the dataset's registration does not name their ids"
        )
        return metadata, []


def _numbered(num_classes):
    things, stuff = num_classes.get("thing_classes", 0), num_classes.get("stuff_classes", 0)
    return Metadata(
        name="no dataset",
        thing_classes=[str(i) for i in range(things)],
        stuff_classes=[str(i) for i in range(stuff)],
        thing_dataset_id_to_contiguous_id={i: i for i in range(things)},
        stuff_dataset_id_to_contiguous_id={things + i: i for i in range(stuff)},
    )


def image_ids(paths: Sequence[str], records: Sequence[dict]) -> list[int | str]:
    """An id for each image: the one in the dataset's ``records`` if one of them has the same path, or is the only one
    with the same file name; else a number that no record has."""
    by_path = {os.path.realpath(record["file_name"]): record.get("image_id") for record in records}
    by_name = {}
    for path, image_id in by_path.items():
        by_name.setdefault(os.path.basename(path), []).append(image_id)
    names = [os.path.basename(path) for path in paths]
    ids = [by_path.get(os.path.realpath(path)) for path in paths]
    for index, name in enumerate(names):
        if ids[index] is None and len(by_name.get(name, [])) == names.count(name) == 1:
            ids[index] = by_name[name][0]
    known = by_path.values() if any(i is not None for i in ids) else []
    numbers = itertools.count(1 + max((i for i in known if isinstance(i, int)), default=0))
    return [next(numbers) if i is None else i for i in ids]


class CocoResults:
    """Collects predictions, and writes them for ``path`` = "out.json":

    - ``out.json``: a list for :meth:`pycocotools.coco.COCO.loadRes`, with the boxes, scores and masks of the instances.
      If the model is a semantic one, it has a mask for each class, as COCO's stuff annotations do.
    - ``out_images.json``: the images with their ids, and the categories, as a COCO dataset without annotations.
    - ``out_panoptic.json`` and the folder ``out_panoptic`` of PNG files, if the model is a panoptic one.

    Category ids are those of the dataset's JSON, or the model's class numbers if the dataset has no such ids.
    """

    def __init__(self, path: str, metadata: Metadata):
        self.path, self.metadata = path, metadata
        self.folder = f"{path.removesuffix('.json')}_panoptic"
        self.images, self.results, self.panoptic = [], [], []
        self._things = _dataset_ids(metadata, "thing")
        self._stuff = _dataset_ids(metadata, "stuff")

    def add(self, image_id: int | str, name: str, picture: str, output: dict) -> None:
        """Add the output for the image that is listed as ``name`` and whose panoptic PNG file is ``picture``."""
        if "panoptic_seg" in output:
            self.panoptic.append(self._add_panoptic(image_id, picture, *output["panoptic_seg"]))
        if "instances" in output:
            height, width = output["instances"].image_size
            for result in instances_to_coco_json(output["instances"], image_id):
                self.results.append({**result, "category_id": self._category(self._things, result["category_id"])})
        elif "sem_seg" in output:
            height, width = output["sem_seg"].shape[-2:]
            self.results += self._regions(image_id, output["sem_seg"].argmax(dim=0).numpy())
        else:
            raise InputError(f"--json: the model's output is neither instances nor a segmentation: {', '.join(output)}")
        self.images.append({"id": image_id, "file_name": name, "height": int(height), "width": int(width)})

    def _category(self, dataset_ids, number):
        if number not in dataset_ids:
            raise InputError(
                f"the model predicts class {number}, and {self.metadata.name!r} has "
                f"{len(dataset_ids)} classes. Name the dataset that the model was trained for"
            )
        return dataset_ids[number]

    def _regions(self, image_id, classes):
        for number in np.unique(classes).tolist():
            rle = pycocotools.mask.encode(np.asfortranarray(classes == number, dtype=np.uint8))
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            category_id = self._category(self._stuff, number)
            yield {"image_id": image_id, "category_id": category_id, "segmentation": segmentation}

    def _add_panoptic(self, image_id, picture, segments, info):
        segments = segments.numpy()
        if info is None:  # as in Panoptic-DeepLab: a segment is class * label_divisor + number, and -1 is void
            segments, info = segments + 1, _decoded(segments, self.metadata)
        areas = dict(zip(*(values.tolist() for values in np.unique(segments, return_counts=True))))
        rgb = np.stack([segments % 256, segments // 256 % 256, segments // 256**2], axis=-1).astype(np.uint8)
        save_png(rgb, os.path.join(self.folder, picture))
        segments_info = [
            {
                "id": segment["id"],
                "category_id": self._category(
                    self._things if segment["isthing"] else self._stuff, segment["category_id"]
                ),
                "area": areas[segment["id"]],
                "iscrowd": 0,
            }
            for segment in info
            if segment["id"] in areas  # panopticapi refuses segments without a pixel
        ]
        return {"image_id": image_id, "file_name": picture, "segments_info": segments_info}

    def write(self) -> list[str]:
        """Write what has been added so far, and return the names of the files."""
        base = self.path.removesuffix(".json")
        listing = {"info": {}, "images": self.images, "annotations": [], "categories": self._categories()}
        contents = {self.path: self.results, f"{base}_images.json": listing}
        if self.panoptic:
            contents[f"{base}_panoptic.json"] = {**listing, "annotations": self.panoptic}
        for path, content in contents.items():
            with atomic_open(path) as file:
                json.dump(content, file)
        return list(contents)

    def _categories(self):
        listed = {}
        for kind, dataset_ids in (("thing", self._things), ("stuff", self._stuff)):
            for number, name in enumerate(self.metadata.get(f"{kind}_classes") or ()):
                if number in dataset_ids:
                    category = {"id": dataset_ids[number], "name": name, "isthing": int(kind == "thing")}
                    listed.setdefault(category["id"], category)
        return list(listed.values())


def _dataset_ids(metadata, kind) -> dict[int, int]:
    """Category ids by the model's class numbers, for the ``kind`` thing or stuff."""
    ids = metadata.get(f"{kind}_dataset_id_to_contiguous_id")
    if ids is None:
        return {i: i for i in range(len(metadata.get(f"{kind}_classes") or ()))}
    return {number: dataset_id for dataset_id, number in ids.items()}


def _decoded(segments, metadata):
    things = metadata.thing_dataset_id_to_contiguous_id.values()
    labels = [label for label in np.unique(segments).tolist() if label >= 0]
    numbers = {label: label // metadata.label_divisor for label in labels}
    return [{"id": label + 1, "category_id": n, "isthing": n in things} for label, n in numbers.items()]
