"""Write drawn scenes as a dataset in COCO's panoptic format: images, instances, panoptic and semantic PNGs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pycocotools.mask
from PIL import Image

from .semantic import semantic_map, semantic_values
from .shapes import Scene


def split_files(root: Path, split: str) -> dict[str, Path]:
    """Where a split's files are, under the names of ``register_coco_panoptic_separated``'s arguments."""
    return {
        "image_root": root / split,
        "panoptic_root": root / f"panoptic_{split}",
        "panoptic_json": root / "annotations" / f"panoptic_{split}.json",
        "sem_seg_root": root / f"panoptic_stuff_{split}",
        "instances_json": root / "annotations" / f"instances_{split}.json",
    }


def write_split(root: Path, split: str, scenes: Iterable[Scene], things: Sequence[str], stuff: Sequence[str]) -> None:
    """Write ``scenes`` under ``root``. Category ids count from 1, things first."""
    files = split_files(root, split)
    for key in ("image_root", "panoptic_root", "sem_seg_root"):
        files[key].mkdir(parents=True)
    files["instances_json"].parent.mkdir(exist_ok=True)

    names = [*things, *stuff]
    categories = [
        {"id": i, "name": name, "supercategory": "thing" if name in things else "stuff", "isthing": int(name in things)}
        for i, name in enumerate(names, 1)
    ]
    value_of = semantic_values(categories)
    images, instances, panoptic = [], [], []
    for image_id, scene in enumerate(scenes, 1):
        stem = f"{image_id:06d}"
        height, width = scene.segments.shape
        images.append({"id": image_id, "file_name": f"{stem}.jpg", "height": height, "width": width})
        segments_info = []
        for index, name in enumerate(scene.classes):
            mask = pycocotools.mask.encode(np.asfortranarray(scene.segments == index, np.uint8))
            category = 1 + names.index(name)
            segment = {"id": 1000 * category + index, "category_id": category, "iscrowd": 0}
            segment.update(area=int(pycocotools.mask.area(mask)), bbox=pycocotools.mask.toBbox(mask).tolist())
            segments_info.append(segment)
            if name in things:
                own = {"id": len(instances) + 1, "image_id": image_id}
                rle = {"size": mask["size"], "counts": mask["counts"].decode()}
                instances.append({**segment, **own, "segmentation": rle})
        panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments_info})

        # Detectron2's loader of semantic maps takes .jpg images only.
        Image.fromarray(scene.image).save(files["image_root"] / f"{stem}.jpg", quality=95, subsampling=0)
        ids = np.array([segment["id"] for segment in segments_info])[scene.segments]
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(files["panoptic_root"] / f"{stem}.png")
        values = {segment["id"]: value_of[segment["category_id"]] for segment in segments_info}
        Image.fromarray(semantic_map(ids, values)).save(files["sem_seg_root"] / f"{stem}.png")

    shared = {"info": {}, "images": images}
    of_things = {"annotations": instances, "categories": [c for c in categories if c["isthing"]]}
    files["instances_json"].write_text(json.dumps({**shared, **of_things}))
    files["panoptic_json"].write_text(json.dumps({**shared, "annotations": panoptic, "categories": categories}))
