"""Data that does not fit the model is refused before the job starts."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from gng_d2.errors import InputError
from gng_d2.job.config import load_config
from gng_d2.job.data.checks import check_classes, prepare_datasets
from gng_d2.job.data.images import NamingMapper
from gng_d2.job.data.loader import build_train_loader
from gng_d2.job.engine import Trainer

ZOO = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent


def quick(*overrides):
    return load_config("configs/quick/pfpn_pgn.yaml", overrides)


@pytest.fixture
def register(tmp_path):
    """Registers records as a dataset, and takes it back after the test."""
    names = []

    def register_records(name, records, **metadata):
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)

    yield register_records
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def record(folder, *boxes, number=0, **entries):
    path = folder / f"{number}.png"
    Image.fromarray(np.full((32, 48, 3), 100, np.uint8)).save(path)
    boxes = [{"bbox": list(box), "bbox_mode": 1, "category_id": 0} for box in boxes]
    return {"file_name": str(path), "image_id": number, "height": 32, "width": 48, "annotations": boxes, **entries}


DETECTOR = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", "False", "DATASETS.TEST", "()"]


def detector(name, *overrides):
    return quick(*DETECTOR, "DATASETS.TRAIN", f"('{name}',)", *overrides)


def test_datasets_that_are_not_there(shapes):
    prepare_datasets(quick())
    with pytest.raises(InputError, match=rf"DATASETS.TRAIN.*coco_2017_train.*{shapes}.*DETECTRON2_DATASETS"):
        prepare_datasets(quick("DATASETS.TRAIN", "('coco_2017_train',)"))
    prepare_datasets(quick("DATASETS.TRAIN", "('coco_2017_train',)"), eval_only=True)
    with pytest.raises(InputError, match="^DATASETS.TRAIN is empty"):
        prepare_datasets(quick("DATASETS.TRAIN", "()"))
    prepare_datasets(quick("DATASETS.TRAIN", "()"), eval_only=True)


def test_a_dataset_that_is_not_registered_says_how_to_register_it():
    with pytest.raises(InputError, match="DATASETS.TEST: no dataset named 'coco_2017_vall'.*--import FILE.py"):
        prepare_datasets(quick("DATASETS.TEST", "('coco_2017_vall',)", "DATASETS.TRAIN", "()"))


RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "DATASETS.TEST", "()"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["MODEL.ROI_HEADS.NUM_CLASSES", "4"],
            r"MODEL.ROI_HEADS.NUM_CLASSES is 4, but .*_separated' has 5 thing_classes",
        ),
        (
            ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"],
            r"SEM_SEG_HEAD.NUM_CLASSES is 2, but .* has 4 stuff_classes. Set it to 4",
        ),
        ([*RETINANET, "MODEL.RETINANET.NUM_CLASSES", "4"], r"MODEL.RETINANET.NUM_CLASSES is 4, .* has 5 thing_classes"),
        (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "0"], r"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is 0, .* 255"),
    ],
)
def test_a_class_too_few_is_refused_with_the_key_and_both_numbers(overrides, message, shapes):
    with pytest.raises(InputError, match=message):
        prepare_datasets(quick(*overrides))


def test_what_is_evaluated_must_fit_too(shapes):
    cfg = quick("MODEL.ROI_HEADS.NUM_CLASSES", "4", "DATASETS.TRAIN", "()")
    with pytest.raises(InputError, match="is 4, but dataset 'gng_shapes_val_separated' has 5"):
        prepare_datasets(cfg, eval_only=True)


def test_keys_that_the_model_does_not_use_are_not_compared(shapes, caplog):
    prepare_datasets(quick("MODEL.RETINANET.NUM_CLASSES", "2", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"))
    stuff = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATASETS.TEST", "()"]
    prepare_datasets(quick(*stuff, "MODEL.ROI_HEADS.NUM_CLASSES", "2"))
    assert not caplog.records


def test_more_classes_than_the_data_has_are_refused_in_training_and_a_warning_in_evaluation(shapes, caplog):
    cfg = quick("MODEL.ROI_HEADS.NUM_CLASSES", "80")
    with pytest.raises(InputError, match="NUM_CLASSES is 80, but dataset 'gng_shapes_train_separated' has 5"):
        prepare_datasets(cfg)
    prepare_datasets(cfg, eval_only=True)
    assert "NUM_CLASSES is 80, but dataset 'gng_shapes_val_separated' has 5 thing_classes" in caplog.text


@pytest.fixture
def coco(tmp_path):
    """Registers a COCO JSON of three categories as docs/own-data.md says, without their names."""
    registered = []

    def register_json(name, **content):
        entry = record(tmp_path)
        images = [{"id": 0, "file_name": "0.png", "height": 32, "width": 48}]
        box = {"id": 1, "image_id": 0, "category_id": 2, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
        categories = [{"id": i, "name": str(i)} for i in (2, 3, 5)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"images": images, "annotations": [box], "categories": categories, **content}))
        register_coco_instances(name, {}, str(path), os.path.dirname(entry["file_name"]))
        registered.append(name)

    yield register_json
    for name in registered:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("number, eval_only", [("5", False), ("2", False), ("2", True)])
def test_categories_that_only_the_json_names_are_compared(number, eval_only, coco):
    """Labels that occur are within 5 classes, and within 2."""
    coco("own")
    cfg = detector("own", "DATASETS.TEST", "('own',)", "MODEL.ROI_HEADS.NUM_CLASSES", number)
    with pytest.raises(
        InputError, match=rf"MODEL.ROI_HEADS.NUM_CLASSES is {number}, but dataset 'own' has 3 thing_classes. Set it to"
    ):
        prepare_datasets(cfg, eval_only)


def test_categories_as_many_as_classes_pass(coco, caplog):
    coco("own")
    prepare_datasets(detector("own", "DATASETS.TEST", "('own',)", "MODEL.ROI_HEADS.NUM_CLASSES", "3"))
    assert not [r for r in caplog.records if r.name.startswith("gng_d2")]


def test_annotations_of_images_that_the_json_lacks_are_counted(coco, caplog):
    """By Detectron2, before the training and in it."""
    box = {"category_id": 2, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    coco("own", annotations=[{**box, "id": i, "image_id": i % 3} for i in range(1, 10)])
    prepare_datasets(detector("own", "MODEL.ROI_HEADS.NUM_CLASSES", "3"))
    assert "own.json contains 9 annotations, but only 3 of them match to images in the file" in caplog.text


@pytest.mark.parametrize("kind", ["image", "annotations"])
def test_what_is_evaluated_last_is_looked_for_first(kind, shapes, coco):
    if kind == "image":
        coco("val", images=[{"id": 0, "file_name": "gone.png", "height": 32, "width": 48}])
    else:
        coco("val", annotations=[{"image_id": 0}])
    message = {"image": "the file .*gone.png of dataset 'val' is not there", "annotations": "val: KeyError.*val.json"}
    with pytest.raises(InputError, match=f"^DATASETS.TEST:? {message[kind]}"):
        prepare_datasets(detector("gng_shapes_train", "DATASETS.TEST", "('val',)"))


def test_a_head_of_another_project_is_compared_by_its_own_key(shapes):
    """AdelaiDet's and CenterMask's FCOS is a proposal generator."""
    cfg = quick("MODEL.PROPOSAL_GENERATOR.NAME", "FCOS", "DATASETS.TEST", "()")
    cfg.MODEL.FCOS = type(cfg)({"NUM_CLASSES": 4})
    with pytest.raises(InputError, match="MODEL.FCOS.NUM_CLASSES is 4, .* has 5 thing_classes"):
        prepare_datasets(cfg)


def test_keypoints_must_be_as_many(register, tmp_path):
    register("poses", [record(tmp_path, (1, 1, 9, 9))], keypoint_names=["a", "b"], thing_classes=["person"])
    for number in ("1", "3"):
        cfg = detector(
            "poses",
            "MODEL.ROI_HEADS.NUM_CLASSES",
            "1",
            "MODEL.KEYPOINT_ON",
            "True",
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
            number,
        )
        with pytest.raises(InputError, match=rf"ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}, .* has 2 keypoint_names"):
            check_classes(cfg)


def test_keypoints_without_names_are_refused(register, tmp_path):
    entry = record(tmp_path, (1, 1, 9, 9))
    entry["annotations"][0]["keypoints"] = [1, 1, 2] * 17
    register("poses", [entry])
    with pytest.raises(InputError, match="DATASETS.TRAIN poses: .*'keypoint_names' does not exist in the metadata"):
        build_train_loader(detector("poses", "MODEL.KEYPOINT_ON", "True"))


def test_datasets_with_other_classes_are_not_taken_for_one(register, tmp_path, caplog):
    register("cats", [record(tmp_path, (1, 1, 9, 9))], thing_classes=["cat", "dog"])
    register("dogs", [record(tmp_path, (1, 1, 9, 9))], thing_classes=["dog", "cat"])
    two = ["MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    with pytest.raises(InputError, match="^DATASETS.TRAIN cats, dogs: .*different metadata 'thing_classes'"):
        build_train_loader(quick(*DETECTOR, "DATASETS.TRAIN", "('cats', 'dogs')", *two))
    check_classes(quick(*DETECTOR[:4], "DATASETS.TRAIN", "('cats',)", "DATASETS.TEST", "('dogs',)", *two))
    assert "'cats' and 'dogs' have other thing_classes, or the same in another order: cat, dog and dog" in caplog.text


def test_every_config_of_the_zoo_fits_its_datasets(caplog):
    count = 0
    for path in sorted(ZOO.rglob("*.yaml")):
        cfg = load_config(str(path))
        if all(name in DatasetCatalog for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
            check_classes(cfg)
            count += bool(cfg.DATASETS.TRAIN)
    assert count > 50 and "NUM_CLASSES" not in caplog.text


XYXY, XYWH = 0, 1


@pytest.mark.parametrize(
    "mode, boxes, refused",
    [
        (XYWH, [(5, 5, 0, 4), (5, 5, 3, 0), (1, 1, 4, 4)], 2),  # empty
        (XYWH, [(5, 5, 0, 4), (5, 5, 3, 2), (1, 1, 4, 4)], 0),
        (XYWH, [(30, 20, 45, 30), (10, 10, 20, 25), (20, 4, 40, 12)], 3),  # two corners: the image is 48 x 32
        (XYXY, [(30, 20, 45, 30), (10, 10, 20, 25), (20, 4, 40, 12)], 0),
        (XYXY, [(30, 20, 15, 10), (1, 1, 10, 15), (20, 4, 20, 8)], 2),  # a corner and sizes
        (XYWH, [(30, 20, 15, 10), (1, 1, 10, 15), (20, 4, 20, 8)], 0),
        (XYWH, [(30, 20, 20, 13)], 0),  # 2 pixels and 1 over the edge
    ],
)
def test_boxes_of_another_kind_than_bbox_mode_says_are_refused(mode, boxes, refused, register, tmp_path):
    register("boxes", [record(tmp_path, *boxes)])
    for annotation in DatasetCatalog.get("boxes")[0]["annotations"]:
        annotation["bbox_mode"] = mode
    if not refused:
        build_train_loader(detector("boxes"))
        return
    message = rf"TRAIN boxes: {refused} of 3 boxes are empty or end outside of their image, .*0.png, 48 x 32. In a COCO"
    with pytest.raises(InputError, match=message):
        build_train_loader(detector("boxes"))


@pytest.mark.parametrize("eval_only", [False, True])
def test_boxes_of_the_test_set_are_looked_at_before_the_training(eval_only, shapes, coco):
    """As two corners; Detectron2 and pycocotools would give an AP, of boxes that are not there."""
    boxes = [(30, 20, 45, 30), (10, 10, 40, 25), (1, 1, 9, 9)]
    coco("val", annotations=[{"id": i, "image_id": 0, "category_id": 2, "bbox": box} for i, box in enumerate(boxes, 1)])
    cfg = detector("gng_shapes_train", "DATASETS.TEST", "('val',)", "MODEL.ROI_HEADS.NUM_CLASSES", "5")
    with pytest.raises(InputError, match=r"^DATASETS.TEST val: 2 of 3 boxes are empty or end outside"):
        prepare_datasets(cfg, eval_only)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize(
    "box, image", [(None, {}), (["1", "1", "9", "9"], {}), ([1, 1, None, 9], {}), ([1, 1, 9, 9], {"width": None})]
)
def test_values_of_a_wrong_type_in_a_json_are_named_by_its_file(box, image, key, coco):
    boxes = [{"id": 1, "image_id": 0, "category_id": 2, "bbox": box}]
    coco("typed", annotations=boxes, images=[{"id": 0, "file_name": "0.png", "height": 32, "width": 48, **image}])
    cfg = detector(
        "typed", "DATASETS.TEST", "('typed',)" if key == "TEST" else "()", "MODEL.ROI_HEADS.NUM_CLASSES", "3"
    )
    with pytest.raises(InputError, match=rf"^DATASETS.{key} typed: .*(typed.json$|0.png has the bbox)"):
        prepare_datasets(cfg, eval_only=key == "TEST")
        build_train_loader(cfg)


def test_data_without_boxes_is_refused(register, tmp_path):
    bare = record(tmp_path)
    del bare["annotations"]
    register("bare", [bare])
    with pytest.raises(InputError, match="DATASETS.TRAIN bare: no image has annotations, and GeneralizedRCNN learns"):
        build_train_loader(detector("bare"))
    register("nothing", [record(tmp_path)])
    with pytest.raises(InputError, match="DATASETS.TRAIN nothing: No valid data found"):
        build_train_loader(detector("nothing", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "True"))
    with pytest.raises(InputError, match="DATASETS.TRAIN nothing: no image has annotations"):
        build_train_loader(detector("nothing", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False"))
    register("things", [record(tmp_path, (1, 1, 9, 9))])
    with pytest.raises(InputError, match="no image has sem_seg_file_name, and PanopticFPN learns"):
        build_train_loader(quick("DATASETS.TRAIN", "('things',)"))


def test_a_label_beyond_the_models_is_named_by_its_image(register, tmp_path):
    """Where the metadata does not say how many classes there are."""
    wrong = record(tmp_path, (1, 1, 9, 9))
    wrong["annotations"][0]["category_id"] = 5
    register("wrong", [wrong])
    with pytest.raises(InputError, match=r"MODEL.ROI_HEADS.NUM_CLASSES is 5, but .*0.png .* category_id 5"):
        build_train_loader(detector("wrong"))


BROKEN = {
    "cut": b'{"images": [',
    "nothing": b"",
    "no images": b'{"annotations": [], "categories": []}',
    "no categories": b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1}]}',
    "a list": b"[1, 2]",
    "not utf-8": b'{"info": "\xe9"}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_json_is_named_by_its_dataset_and_file(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    register_coco_instances("broken", {}, str(path), str(tmp_path))
    try:
        with pytest.raises(InputError, match=f"^DATASETS.TRAIN broken: .* in {path}$"):
            build_train_loader(detector("broken"))
        with pytest.raises(InputError, match=f"^DATASETS.TEST broken: .* in {path}$"):
            Trainer.build_test_loader(quick(), "broken")
    finally:
        DatasetCatalog.remove("broken")
        MetadataCatalog.remove("broken")


@pytest.mark.parametrize("bbox", [[5, 5], None, 3])
def test_a_box_that_is_none_is_named_by_its_image(bbox, register, tmp_path):
    wrong = record(tmp_path, (1, 1, 9, 9))
    wrong["annotations"][0]["bbox"] = bbox
    register("wrong", [wrong])
    with pytest.raises(InputError, match=r"^DATASETS.TRAIN wrong: .*0.png has the bbox "):
        build_train_loader(detector("wrong"))


def test_an_annotation_that_cannot_be_used_is_named_by_its_image(tmp_path):
    wrong = record(tmp_path, (1, 1, 9, 9))
    wrong["annotations"][0]["segmentation"] = {"counts": "zz", "size": [1, 1]}
    mapper = DatasetMapper(quick(), is_train=True)
    with pytest.raises(InputError, match=r"^the annotations of the image .*0.png cannot be used: ValueError: .*RLE"):
        NamingMapper(mapper)(wrong)


@pytest.mark.parametrize("seed", ["1", "-1"])
@pytest.mark.parametrize("kind", ["text", "cut", "empty", "gone", "size"])
def test_a_broken_image_is_named_by_its_file(kind, seed, register, tmp_path):
    broken = record(tmp_path, (1, 1, 9, 9))
    path = Path(broken["file_name"])
    if kind == "gone":
        path.unlink()
    elif kind == "size":
        broken["height"] = 33
    else:
        content = path.read_bytes()
        path.write_bytes({"text": b"Not found", "cut": content[: len(content) // 2], "empty": b""}[kind])
    register("broken", [broken])
    with pytest.raises(InputError, match=path.name) as error:
        next(iter(build_train_loader(detector("broken", "SEED", seed, "SOLVER.IMS_PER_BATCH", "1"))))
    assert len(str(error.value).splitlines()) == 1


def test_a_broken_semantic_map_is_named_and_not_its_image(register, tmp_path):
    (tmp_path / "labels.png").write_bytes(b"")
    register("maps", [record(tmp_path, (1, 1, 9, 9), sem_seg_file_name=str(tmp_path / "labels.png"))])
    cfg = quick("DATASETS.TRAIN", "('maps',)", "MODEL.MASK_ON", "False", "SOLVER.IMS_PER_BATCH", "1")
    with pytest.raises(InputError, match="labels.png cannot be read"):
        next(iter(build_train_loader(cfg)))


@pytest.fixture
def maps(register, tmp_path):
    """Registers a semantic dataset with this map, given as an image of Pillow, and returns a config for it."""

    def with_map(image, *overrides):
        image.save(tmp_path / "labels.png")
        register("maps", [record(tmp_path, sem_seg_file_name=str(tmp_path / "labels.png"))], evaluator_type="sem_seg")
        small = ["SOLVER.IMS_PER_BATCH", "1", "MODEL.META_ARCHITECTURE", "SemanticSegmentor"]
        return quick(*small, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "4", "DATASETS.TRAIN", "('maps',)", *overrides)

    return with_map


def grey(*values, size=(48, 32), dtype=np.uint8):
    return Image.fromarray(np.resize(np.array(values, dtype), size[::-1]))


def palette(dark):
    image = grey(0, 1, 2, 3).convert("P")
    image.putpalette([level * (1 if dark else 60) for level in range(4) for _ in "RGB"])
    return image


NO_MAPS = {
    "a class too many": (grey(0, 3, 4, 255), "labels.png has the value 4.*classes, 0 to 3, and 255"),
    "grey levels": (grey(0, 85, 170, 255), "labels.png has the value 85"),
    "colours": (grey(0, 1).convert("RGB"), "labels.png is not greyscale but of Pillow's mode RGB"),
    "a palette": (palette(dark=False), "labels.png is not greyscale but of Pillow's mode P"),
    "a palette of small values": (palette(dark=True), "labels.png is not greyscale but of Pillow's mode P"),
    "transparency": (grey(0, 1).convert("LA"), "labels.png is not greyscale but of Pillow's mode LA"),
    "another size": (grey(0, 1, size=(24, 16)), "0.png is 48 x 32, .*labels.png is 24 x 16"),
}


@pytest.mark.parametrize("image, message", NO_MAPS.values(), ids=NO_MAPS.keys())
def test_a_map_that_is_none_is_refused_with_its_file(image, message, maps):
    cfg = maps(image, "DATASETS.TEST", "()")
    with pytest.raises(InputError, match=message):
        next(iter(build_train_loader(cfg)))


@pytest.mark.parametrize("eval_only", [False, True])
def test_maps_of_the_test_set_are_looked_at_before_the_training(eval_only, maps):
    """Detectron2 counts a class that there is not as another one, without a word."""
    with pytest.raises(InputError, match="labels.png has the value 9"):
        prepare_datasets(maps(grey(0, 9), "DATASETS.TEST", "('maps',)"), eval_only)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_with_classes_and_what_is_not_annotated_pass(dtype, maps):
    cfg = maps(grey(0, 1, 2, 3, 255, dtype=dtype), "DATASETS.TEST", "('maps',)")
    prepare_datasets(cfg)
    assert set(next(iter(build_train_loader(cfg)))[0]["sem_seg"].unique().tolist()) == {0, 1, 2, 3, 255}


@pytest.mark.parametrize("key, wanted", [("MASK_ON", "segmentation"), ("KEYPOINT_ON", "keypoints")])
def test_annotations_without_what_a_head_learns_are_refused(key, wanted, register, tmp_path):
    entry = record(tmp_path, (1, 1, 9, 9), (2, 2, 9, 9))
    entry["annotations"][0].update(segmentation=[[1, 1, 9, 1, 9, 9]], keypoints=[1, 1, 2] * 17)
    register("bare", [entry], keypoint_names=["a"] * 17, keypoint_flip_map=[])
    with pytest.raises(InputError, match=rf"1 of 2 annotations have no {wanted}, .*0.png. Set MODEL.{key} to False"):
        build_train_loader(detector("bare", f"MODEL.{key}", "True"))


def test_a_fault_of_the_users_own_mapper_stays_what_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError):
        NamingMapper(lambda record: 1 / 0)(record(tmp_path, (1, 1, 9, 9)))


def test_a_broken_image_is_named_where_a_semantic_dataset_is_grouped_by_shape(register, tmp_path):
    entry = record(tmp_path, sem_seg_file_name=str(tmp_path / "0.png"))
    for key in ("width", "height", "annotations"):
        del entry[key]
    Path(entry["file_name"]).write_bytes(b"x")
    register("grouped", [entry])
    stuff = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "1"]
    with pytest.raises(InputError, match="0.png cannot be read"):
        next(iter(build_train_loader(quick("DATASETS.TRAIN", "('grouped',)", *stuff, "SEED", "1"))))


@pytest.mark.parametrize("name", ["evil.pkl", "evil.proposals"])
def test_a_file_of_proposals_is_not_run(name, shapes, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "ran").encode() + b"\ntR.")
    files = ["DATASETS.PROPOSAL_FILES_TRAIN", f"('{tmp_path / name}',)", "MODEL.LOAD_PROPOSALS", "True"]
    with pytest.raises(InputError, match=rf"DATASETS.PROPOSAL_FILES_TRAIN: .*{name} .* asks for os.mkdir"):
        prepare_datasets(quick(*files))
    assert not (tmp_path / "ran").exists()


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING, logger="gng_d2")
