"""Registers semantic maps of your own under the names that own_semantic.yaml has.

tools/train_net.py --import configs/examples/own_semantic.py --config-file configs/examples/own_semantic.yaml
"""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

ROOT = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "own_semantic")
CLASSES = ["road", "building", "tree", "sky"]  # a pixel's value in a map is the place of its class in this list
NOT_ANNOTATED = 255

for split in ("train", "val"):
    images, maps = os.path.join(ROOT, split), os.path.join(ROOT, f"{split}_maps")
    DatasetCatalog.register(f"own_semantic_{split}", lambda images=images, maps=maps: load_sem_seg(maps, images))
    MetadataCatalog.get(f"own_semantic_{split}").set(
        stuff_classes=CLASSES,
        ignore_label=NOT_ANNOTATED,
        image_root=images,
        sem_seg_root=maps,
        evaluator_type="sem_seg",
    )
