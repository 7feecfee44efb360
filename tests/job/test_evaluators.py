"""What would make an evaluation fail after the training is refused before it."""

import copy
import json
import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from panopticapi.evaluation import pq_compute_single_core
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from gng_d2.job.evaluators import check_evaluation

DETECTOR = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "DATASETS.TEST", "('gng_shapes_val',)"]
KEYPOINTS = [
    *DETECTOR[:2],
    "DATASETS.TEST",
    "('own',)",
    "MODEL.KEYPOINT_ON",
    "True",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
]


TRIANGLE = [1, 1, 9, 1, 9, 9]
WHOLE = {
    "id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 1, 8, 8], "area": 32, "iscrowd": 0,
    "segmentation": [TRIANGLE], "keypoints": [1, 1, 2] * 17, "num_keypoints": 17,
}  # fmt: skip
EVALUATED = {
    "bbox": ["MODEL.MASK_ON", "False"],
    "segm": ["MODEL.MASK_ON", "True"],
    "keypoints": ["MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True"],
}


@pytest.fixture
def coco(tmp_path):
    """Registers a COCO JSON of one image with this annotation, and returns the path of the JSON."""

    def register(annotation):
        images = [{"id": 7, "file_name": "7.png", "height": 20, "width": 30}]
        path = tmp_path / "own.json"
        categories = [{"id": 1, "name": "one"}]
        path.write_text(json.dumps({"images": images, "annotations": [annotation], "categories": categories}))
        register_coco_instances("own", {}, str(path), str(tmp_path))
        return str(path)

    yield register
    DatasetCatalog.remove("own")
    MetadataCatalog.remove("own")


def check(folder, *overrides):
    file = "COCO-Detection/retinanet_R_50_FPN_1x.yaml" if "RetinaNet" in overrides else "configs/quick/pfpn_pgn.yaml"
    cfg = load_config(file, ["OUTPUT_DIR", str(folder / "out"), *overrides])
    check_evaluation(cfg, build_on_meta(cfg))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        DETECTOR,
        [*DETECTOR, "TEST.AUG.ENABLED", "True"],
        ["MODEL.META_ARCHITECTURE", "ProposalNetwork", *DETECTOR[2:]],
        ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATASETS.TEST", "('gng_shapes_val_stuffonly',)"],
        ["TEST.AUG.ENABLED", "True", "DATASETS.TEST", "()"],
        [*KEYPOINTS, "17"],
        [*KEYPOINTS, "2", "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.2]"],
    ],
)
def test_what_can_be_evaluated_passes(overrides, shapes, coco, tmp_path):
    coco(WHOLE)
    check(tmp_path, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["MODEL.META_ARCHITECTURE", "RetinaNet", *DETECTOR[2:]],
        ["MODEL.META_ARCHITECTURE", "ProposalNetwork", *DETECTOR[2:]],
        ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATASETS.TEST", "('gng_shapes_val_stuffonly',)"],
        [*KEYPOINTS, "17"],
    ],
    ids=lambda overrides: overrides[1] if overrides else "PanopticFPN",
)
def test_test_time_augmentation_of_a_model_that_has_none(overrides, shapes, coco, tmp_path):
    coco(WHOLE)
    with pytest.raises(InputError, match="^TEST.AUG.ENABLED: Detectron2's test-time augmentation does not take this"):
        check(tmp_path, *overrides, "TEST.AUG.ENABLED", "True")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            DETECTOR[:2],
            "'gng_shapes_val_separated' needs the panoptic_seg and sem_seg .* GeneralizedRCNN gives instances",
        ),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "SemanticSegmentor gives sem_seg"),
        (
            ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", *DETECTOR[2:]],
            "'gng_shapes_val' needs the instances or proposals of a model, and a SemanticSegmentor gives sem_seg",
        ),
        (["MODEL.PANOPTIC_FPN.COMBINE.ENABLED", "False"], "a PanopticFPN gives instances and sem_seg"),
        ([*KEYPOINTS, "2"], "TEST.KEYPOINT_OKS_SIGMAS stands for 17 keypoints, and .*NUM_KEYPOINTS is 2"),
    ],
)
def test_an_evaluation_of_what_the_model_does_not_give(overrides, message, shapes, coco, tmp_path):
    coco(WHOLE)
    with pytest.raises(InputError, match=message):
        check(tmp_path, *overrides)


def pycocotools_ap(path, task):
    """The AP of a prediction that is the annotation itself."""
    truth = COCO(path)
    found = truth.loadRes([{**WHOLE, "score": 1.0}])
    evaluation = COCOeval(truth, found, task)
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("bbox", {"segmentation": ..., "keypoints": ..., "num_keypoints": ...}, None),
        ("bbox", {"area": ...}, "has no area, .*the width times the height"),
        ("bbox", {"iscrowd": ...}, "has no iscrowd, "),
        ("bbox", {"bbox": ...}, "has no bbox, "),
        ("segm", {"segmentation": ...}, "has no segmentation, "),
        ("segm", {"segmentation": []}, r"has the segmentation \[\], .*one polygon or more"),
        ("segm", {"segmentation": [[1, 1, 9, 9]]}, r"has the segmentation .* six numbers or more"),
        ("segm", {"segmentation": [TRIANGLE, [1, 1, 9, 9]]}, None),
        ("segm", {"segmentation": {"size": [20, 30], "counts": [5, 595]}}, None),
        ("keypoints", {"num_keypoints": ...}, "has no num_keypoints, "),
        ("keypoints", {"keypoints": ..., "area": ...}, "has no area and no keypoints, "),
    ],
)
def test_annotations_with_which_pycocotools_stops_are_refused(task, change, message, coco, tmp_path):
    """``...`` is what the annotation lacks."""
    path = coco({key: value for key, value in {**WHOLE, **change}.items() if value is not ...})
    overrides = [*DETECTOR[:2], "DATASETS.TEST", "('own',)", *EVALUATED[task]]
    if message is None:
        check(tmp_path, *overrides)
        pycocotools_ap(path, task)
        return
    with pytest.raises(InputError, match=f"^DATASETS.TEST: in 'own' the annotation with the id 1 {message}"):
        check(tmp_path, *overrides)
    with pytest.raises((KeyError, IndexError, TypeError)):
        pycocotools_ap(path, task)


@pytest.mark.parametrize("number, ap", [(1, 1), (0, 0)])
def test_an_annotation_with_the_id_0_is_a_warning(number, ap, coco, tmp_path, caplog):
    """pycocotools counts it as missed, though the prediction is the annotation itself."""
    path = coco({**WHOLE, "id": number})
    assert pycocotools_ap(path, "bbox") == pytest.approx(ap)
    with caplog.at_level(logging.WARNING, logger="gng_d2"):
        check(tmp_path, *DETECTOR[:2], "DATASETS.TEST", "('own',)", *EVALUATED["bbox"])
    assert ("the annotation with the id 0 counts as missed" in caplog.text) == (number == 0)


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "RetinaNet"])
def test_a_model_without_heads_needs_no_masks(architecture, coco, tmp_path):
    coco(
        {
            key: value
            for key, value in WHOLE.items()
            if key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        }
    )
    heads = ["MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True"]
    check(tmp_path, "MODEL.META_ARCHITECTURE", architecture, "DATASETS.TEST", "('own',)", *heads)


@pytest.mark.parametrize("change, message", [
    (lambda content: content.pop("annotations"), "KeyError: annotations in .*own.json"),
    (lambda content: content["annotations"][1].pop("file_name"), "an annotation has no file_name, "),
    (lambda content: content["annotations"][1].update(file_name="gone.png"), "the file .*gone.png .* is not there"),
])  # fmt: skip
def test_a_panoptic_json_that_cannot_be_evaluated_is_named(change, message, shapes, tmp_path, monkeypatch):
    metadata = MetadataCatalog.get("gng_shapes_val_separated")
    content = json.loads(Path(metadata.panoptic_json).read_text())
    change(content)
    (tmp_path / "own.json").write_text(json.dumps(content))
    monkeypatch.setitem(vars(metadata), "panoptic_json", str(tmp_path / "own.json"))
    with pytest.raises(InputError, match=f"^DATASETS.TEST.*{message}"):
        check(tmp_path)


@pytest.mark.parametrize("field", ["id", "category_id", "area", "iscrowd"])
def test_segments_with_which_panopticapi_stops_are_refused(field, shapes, tmp_path, monkeypatch):
    metadata = MetadataCatalog.get("gng_shapes_val_separated")
    content, root = json.loads(Path(metadata.panoptic_json).read_text()), metadata.panoptic_root
    (path := tmp_path / "own.json").write_text(json.dumps(content))
    monkeypatch.setitem(vars(metadata), "panoptic_json", str(path))
    check(tmp_path)
    predicted = copy.deepcopy(content["annotations"][1])
    del content["annotations"][1]["segments_info"][0][field]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"^DATASETS.TEST: in {path} a segment of .*png has no {field}, "):
        check(tmp_path)
    categories = {category["id"]: category for category in content["categories"]}
    with pytest.raises(KeyError):
        pq_compute_single_core(0, [(content["annotations"][1], predicted)], root, root, categories)


@pytest.mark.parametrize("kind, package", [("coco_panoptic_seg", "panopticapi-lite"), ("lvis", "lvis"),
                                           ("cityscapes_instance", "cityscapesscripts")])  # fmt: skip
def test_a_missing_package_is_named(kind, package, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    DatasetCatalog.register("packaged", list)
    MetadataCatalog.get("packaged").evaluator_type = kind
    try:
        with pytest.raises(InputError, match=f"DATASETS.TEST: to evaluate 'packaged', .*pip install {package}$"):
            check(tmp_path, "DATASETS.TEST", "('packaged',)")
    finally:
        DatasetCatalog.remove("packaged")
        MetadataCatalog.remove("packaged")


def test_a_dataset_that_nothing_evaluates_is_named(tmp_path):
    DatasetCatalog.register("bare", list)
    try:
        with pytest.raises(InputError, match="DATASETS.TEST: 'bare' has evaluator_type None; known: coco, "):
            check(tmp_path, "DATASETS.TEST", "('bare',)")
    finally:
        DatasetCatalog.remove("bare")


@pytest.mark.parametrize("folder", ["inference", "inference_TTA"])
def test_folders_of_results_that_cannot_be_written(folder, shapes, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / folder).write_text("")
    with pytest.raises(InputError, match=f"cannot write to '.*/out/{folder}'"):
        check(tmp_path, *DETECTOR, "TEST.AUG.ENABLED", "True")
