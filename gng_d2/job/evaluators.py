"""What each dataset is evaluated with. What would make an evaluation fail is refused before the training."""

import importlib.util
import inspect
import json
import logging
import os

from detectron2 import evaluation
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, ProposalNetwork, RetinaNet, SemanticSegmentor
from detectron2.utils.file_io import PathManager
from torch import nn

from gng_d2.errors import InputError

from .data.checks import naming_datasets
from .data.images import read_labels
from .files import prepare_folder

# by the `evaluator_type` of Detectron2's metadata: the evaluators; the outputs of a model that they evaluate, which are
# any of these sets; the package in which they compute
_EVALUATIONS = {
    "coco": ([evaluation.COCOEvaluator], [{"instances"}, {"proposals"}], "pycocotools"),
    "coco_panoptic_seg": (
        [evaluation.SemSegEvaluator, evaluation.COCOEvaluator, evaluation.COCOPanopticEvaluator],
        [{"sem_seg", "panoptic_seg"}],
        "panopticapi",
    ),
    "sem_seg": ([evaluation.SemSegEvaluator], [{"sem_seg"}], "pycocotools"),
    "lvis": ([evaluation.LVISEvaluator], [{"instances"}, {"proposals"}], "lvis"),
    "pascal_voc": ([evaluation.PascalVOCDetectionEvaluator], [{"instances"}], "pycocotools"),
    "cityscapes_instance": ([evaluation.CityscapesInstanceEvaluator], [{"instances"}], "cityscapesscripts"),
    "cityscapes_sem_seg": ([evaluation.CityscapesSemSegEvaluator], [{"sem_seg"}], "cityscapesscripts"),
}
# the outputs of Detectron2's models. Models of other projects, subclasses of these too, are not compared
_GIVEN = {
    GeneralizedRCNN: {"instances"},
    RetinaNet: {"instances"},
    PanopticFPN: {"instances", "sem_seg", "panoptic_seg"},
    ProposalNetwork: {"proposals"},
    SemanticSegmentor: {"sem_seg"},
}
_COCO_KEYPOINTS = 17


def build_evaluator(cfg: CfgNode, name: str, folder: str) -> evaluation.DatasetEvaluators:
    """The evaluators of the dataset ``name``, which write to ``folder``.

    Raises:
        InputError: there are none for such a dataset, or they need a package that is not installed.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind not in _EVALUATIONS:
        known = ", ".join(_EVALUATIONS)
        raise InputError(f"DATASETS.TEST: {name!r} has evaluator_type {kind!r}; known: {known}")
    evaluators, _, package = _EVALUATIONS[kind]
    if importlib.util.find_spec(package) is None:
        pip = {"panopticapi": "panopticapi-lite"}.get(package, package)
        raise InputError(f"DATASETS.TEST: to evaluate {name!r}, install {package}: pip install {pip}")
    # Detectron2's own reader of maps asks for copy=False, which numpy 2 refuses; its version 0.6 does not take another
    options = {"output_dir": folder, "kpt_oks_sigmas": cfg.TEST.KEYPOINT_OKS_SIGMAS, "sem_seg_loading_fn": read_labels}
    with naming_datasets("DATASETS.TEST", [name]):
        return evaluation.DatasetEvaluators([_make(evaluator, name, options) for evaluator in evaluators])


def _make(evaluator, name, options):
    """The evaluator of the dataset ``name``, with those of ``options`` that it takes."""
    taken = inspect.signature(evaluator).parameters
    return evaluator(name, **{key: value for key, value in options.items() if key in taken})


def check_evaluation(cfg: CfgNode, model: nn.Module) -> None:
    """See that ``model`` can be evaluated on each dataset of DATASETS.TEST, with test-time augmentation where
    TEST.AUG.ENABLED asks for it, and that the results can be written.

    Args:
        model: that of ``cfg``, for its structure.

    Raises:
        InputError: names the key, and for a dataset its name.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    given = _GIVEN.get(type(model))
    if type(model) is PanopticFPN and not cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED:
        given = given - {"panoptic_seg"}
    for name in cfg.DATASETS.TEST:
        prepare_folder(folder)
        evaluators, metadata = build_evaluator(cfg, name, folder)._evaluators, MetadataCatalog.get(name)
        for evaluator in evaluators:
            if isinstance(evaluator, evaluation.COCOEvaluator) and evaluator._do_evaluation:
                with_heads = [
                    cfg.MODEL[key] and isinstance(model, GeneralizedRCNN) for key in ("MASK_ON", "KEYPOINT_ON")
                ]
                _check_instances(name, evaluator._coco_api.dataset["annotations"], *with_heads)
            elif isinstance(evaluator, evaluation.COCOPanopticEvaluator):
                _check_segments(name, metadata.panoptic_json, metadata.panoptic_root)
        evaluated = _EVALUATIONS[metadata.evaluator_type][1]
        if given is not None and not any(outputs <= given for outputs in evaluated):
            needed = " or ".join(" and ".join(sorted(outputs)) for outputs in evaluated)
            raise InputError(
                f"DATASETS.TEST: the evaluation of {name!r} needs the {needed} of a model, and a "
                f"{type(model).__name__} gives {' and '.join(sorted(given))}. Test on a dataset for such a model"
            )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or _COCO_KEYPOINTS
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if cfg.DATASETS.TEST and cfg.MODEL.KEYPOINT_ON and sigmas != keypoints:
        raise InputError(
            f"TEST.KEYPOINT_OKS_SIGMAS stands for {sigmas} keypoints, and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is "
            f"{keypoints}. Give one sigma for each keypoint"
        )
    if cfg.DATASETS.TEST and cfg.TEST.AUG.ENABLED:
        prepare_folder(f"{folder}_TTA")
        of_rcnn = isinstance(model, GeneralizedRCNN) and not isinstance(model, PanopticFPN)
        if not of_rcnn or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
            raise InputError(
                f"TEST.AUG.ENABLED: Detectron2's test-time augmentation does not take this {type(model).__name__}. It "
                f"takes a GeneralizedRCNN without keypoints that computes its own proposals"
            )


def _check_instances(name, annotations, has_masks, has_keypoints):
    """See that pycocotools can evaluate with these, of which it reads more than Detectron2's loader does."""
    needed = ["bbox", "area", "iscrowd"]
    needed += ["segmentation"] * has_masks + ["keypoints", "num_keypoints"] * has_keypoints
    for annotation in annotations:
        where = f"DATASETS.TEST: in {name!r} the annotation with the id {annotation['id']}"
        _need(where, annotation, needed)
        polygons = annotation["segmentation"] if has_masks else None
        if isinstance(polygons, list) and not (polygons and len(polygons[0]) > 4):
            raise InputError(
                f"{where} has the segmentation {polygons}, with which pycocotools cannot evaluate. A mask has one "
                f"polygon or more, each of six numbers or more"
            )
        if annotation["id"] == 0 and not annotation["iscrowd"]:
            logging.getLogger(__name__).warning(
                f"{where} counts as missed even where it is found, because pycocotools takes 0 for no annotation. "
                f"Count from 1"
            )


def _check_segments(name, panoptic_json, panoptic_root):
    """See that panopticapi can evaluate with these, of which Detectron2's loader reads nothing."""
    with naming_datasets("DATASETS.TEST", [name], [panoptic_json]):
        with PathManager.open(panoptic_json) as file:
            annotations = json.load(file)["annotations"]
        for annotation in annotations:
            _need(f"DATASETS.TEST: in {panoptic_json} an annotation", annotation, ["image_id", "file_name"])
            path = os.path.join(panoptic_root, annotation["file_name"])
            if not PathManager.exists(path):
                raise InputError(f"DATASETS.TEST: the file {path} of dataset {name!r} is not there")
            for segment in annotation["segments_info"]:
                where = f"DATASETS.TEST: in {panoptic_json} a segment of {annotation['file_name']}"
                _need(where, segment, ["id", "category_id", "area", "iscrowd"])


def _need(where, annotation, fields):
    missing = [field for field in fields if field not in annotation]
    if missing:
        raise InputError(
            f"{where} has no {' and no '.join(missing)}, without which it cannot be evaluated. In COCO's formats area "
            f"is that of the mask, or the width times the height of the box, and iscrowd is 0 or 1"
        )
