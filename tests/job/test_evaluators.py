"""What would make an evaluation fail after the training is refused before it."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from gng_d2.job.evaluators import check_evaluation

DETECTOR = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "DATASETS.TEST", "('gng_shapes_val',)"]
KEYPOINTS = [*DETECTOR, "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"]


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
def test_what_can_be_evaluated_passes(overrides, shapes, tmp_path):
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
def test_test_time_augmentation_of_a_model_that_has_none(overrides, shapes, tmp_path):
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
def test_an_evaluation_of_what_the_model_does_not_give(overrides, message, shapes, tmp_path):
    with pytest.raises(InputError, match=message):
        check(tmp_path, *overrides)


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
