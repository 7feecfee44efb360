"""Registers a dataset of your own, in COCO's format, under the names that own_data.yaml has.

tools/train_net.py --import configs/examples/own_data.py --config-file configs/examples/own_data.yaml
"""

import os

from detectron2.data.datasets import register_coco_instances

ROOT = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "own_data")
for split in ("train", "val"):
    register_coco_instances(f"own_{split}", {}, os.path.join(ROOT, f"{split}.json"), os.path.join(ROOT, split))
