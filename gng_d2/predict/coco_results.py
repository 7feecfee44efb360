"""Predictions in COCO's formats, which pycocotools and panopticapi read."""

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
from gng_d2.job.data.checks import naming_datasets
from gng_d2.job.files import atomic_open

from .predictions import save_png
from .settings import PredictionSettings


def class_metadata(settings: PredictionSettings, with_records: bool) -> tuple[Metadata, list[dict]]:
    """The metadata of the dataset to test on, which names the classes, and the dataset's records.

    The list of records is empty if ``with_records`` is False or the dataset's files are missing. If the config has no
    dataset to test on, the classes are called by their numbers.

    Raises:
        InputError: the dataset is not registered, or the file that names its classes cannot be read.
    """
    name, key = settings.dataset, settings.dataset_key
    if name is None:
        things, stuff = (settings.num_classes.get(kind, 0) for kind in ("thing_classes", "stuff_classes"))
        numbered = Metadata(
            name="no dataset",
            thing_classes=[str(i) for i in range(things)],
            stuff_classes=[str(i) for i in range(stuff)],
            stuff_dataset_id_to_contiguous_id={things + i: i for i in range(stuff)},
        )
        return numbered, []
    mend = f"{key}{' ()' if key.isupper() else '=[]'} calls the classes by their numbers"
    if name not in DatasetCatalog:
        raise InputError(
            f"{key}: no dataset named {name!r} is registered, so the names of the classes are not known. "
            f"--import runs the module that registers it; {mend}"
        )
    metadata = MetadataCatalog.get(name)
    named = metadata.get("thing_classes") or metadata.get("stuff_classes")
    if named and not with_records:
        return metadata, []
    try:
        with naming_datasets(key, [name]):
            return metadata, DatasetCatalog.get(name)
    except (OSError, InputError) as error:
        if not named:
            raise InputError(f"the names of the classes cannot be read: {error}. {mend}") from error
        logging.getLogger(__name__).warning(
            f"the files of dataset {name!r} cannot be read ({error}). So the ids of images are numbers, and those of "
            f"categories too if the dataset's registration does not have them"
        )
        return metadata, []


def image_ids(paths: Sequence[str], records: Sequence[dict]) -> list[int | str]:
    """An id for each image. It is the id of the record in the dataset's ``records`` that has the image's path, or that
    alone has its file name; without such a record it is a number that no record has."""
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
    """Collects predictions and writes them. With ``path`` "out.json" the files are:

    - ``out.json``, a list for :meth:`pycocotools.coco.COCO.loadRes` with the boxes, scores and masks of the instances.
      For a semantic model it has a mask of each class, as COCO's stuff annotations do.
    - ``out_images.json``, a COCO dataset without annotations: the images with their ids, and the categories.
    - ``out_panoptic.json`` and a folder ``out_panoptic`` of PNG files, if the model is a panoptic one.

    The ids of categories are those in the dataset's JSON, or the model's class numbers if the dataset has no such ids.
    """

    def __init__(self, path: str, metadata: Metadata):
        self.path, self.metadata = path, metadata
        self.folder = f"{path.removesuffix('.json')}_panoptic"
        self.images, self.results, self.panoptic = [], [], []
        self._things = _dataset_ids(metadata, "thing")
        self._stuff = _dataset_ids(metadata, "stuff")

    def add(self, image_id: int | str, name: str, picture: str, output: dict) -> None:
        """Add a model's ``output`` for an image. It is called ``name`` in the list of images, and ``picture`` is the
        name of its panoptic PNG file."""
        if "panoptic_seg" in output:
            self.panoptic.append(self._add_panoptic(image_id, picture, *output["panoptic_seg"]))
        if "instances" in output:
            height, width = output["instances"].image_size
            for result in instances_to_coco_json(output["instances"], image_id):
                self.results.append({**result, "category_id": self._category(self._things, result["category_id"])})
        else:
            height, width = output["sem_seg"].shape[-2:]
            self.results += self._regions(image_id, output["sem_seg"].argmax(dim=0).numpy())
        self.images.append({"id": image_id, "file_name": name, "height": int(height), "width": int(width)})

    def _category(self, dataset_ids, number):
        if number not in dataset_ids:
            raise InputError(
                f"the model predicts class {number}, but {self.metadata.name!r} has {len(dataset_ids)} classes. Name "
                f"the dataset that the model was trained for"
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
        if info is None:  # Panoptic-DeepLab: a segment is called class * label_divisor + number, and -1 is void
            things, divisor = self.metadata.thing_dataset_id_to_contiguous_id.values(), self.metadata.label_divisor
            classes = {label: label // divisor for label in np.unique(segments).tolist() if label >= 0}
            info = [{"id": label + 1, "category_id": n, "isthing": n in things} for label, n in classes.items()]
            segments = segments + 1
        areas = dict(zip(*(values.tolist() for values in np.unique(segments, return_counts=True))))
        rgb = np.stack([segments % 256, segments // 256 % 256, segments // 256**2], axis=-1).astype(np.uint8)
        save_png(rgb, os.path.join(self.folder, picture))
        segments_info = []
        for segment in info:
            if segment["id"] in areas:  # panopticapi refuses segments without a pixel
                category = self._category(self._things if segment["isthing"] else self._stuff, segment["category_id"])
                segments_info.append(
                    {"id": segment["id"], "category_id": category, "area": areas[segment["id"]], "iscrowd": 0}
                )
        return {"image_id": image_id, "file_name": picture, "segments_info": segments_info}

    def write(self) -> list[str]:
        """Write the files with all that was added so far, and return their names."""
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
    """The ids of categories by the model's class numbers, for the ``kind`` "thing" or "stuff"."""
    ids = metadata.get(f"{kind}_dataset_id_to_contiguous_id")
    if ids is None:
        return {i: i for i in range(len(metadata.get(f"{kind}_classes") or ()))}
    return {number: dataset_id for dataset_id, number in ids.items()}
