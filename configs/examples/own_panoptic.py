"""Registers panoptic data of your own, in COCO's format, under the names that own_panoptic.yaml has.

tools/train_net.py --import configs/examples/own_panoptic.py --config-file configs/examples/own_panoptic.yaml
"""

import json
import os

from detectron2.data.datasets import register_coco_panoptic_separated

ROOT = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "own_panoptic")

for split in ("train", "val"):
    files = {
        "image_root": os.path.join(ROOT, split),
        "panoptic_root": os.path.join(ROOT, f"panoptic_{split}"),
        "panoptic_json": os.path.join(ROOT, f"panoptic_{split}.json"),
        "sem_seg_root": os.path.join(ROOT, f"semantic_{split}"),
        "instances_json": os.path.join(ROOT, f"instances_{split}.json"),
    }
    with open(files["panoptic_json"]) as file:
        categories = sorted(json.load(file)["categories"], key=lambda category: category["id"])
    things = [category for category in categories if category["isthing"]]
    stuff = [category for category in categories if not category["isthing"]]
    metadata = {
        "thing_classes": [category["name"] for category in things],
        "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(things)},
        # class 0 of the semantic head is all things together
        "stuff_classes": ["things", *(category["name"] for category in stuff)],
        "stuff_dataset_id_to_contiguous_id": {0: 0, **{category["id"]: i for i, category in enumerate(stuff, 1)}},
    }
    register_coco_panoptic_separated(f"own_panoptic_{split}", metadata, **files)
