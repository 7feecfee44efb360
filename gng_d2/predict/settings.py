"""The settings in a config, YAML or lazy, that prediction needs: how to read images, and which classes there are."""

from typing import NamedTuple

from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from omegaconf import OmegaConf

from gng_d2.errors import InputError
from gng_d2.job.config import Config
from gng_d2.job.data import checks

# the keys of Detectron2's lazy configs that have a model's number of classes
_NUM_CLASSES = {
    "model.roi_heads.num_classes": "thing_classes",
    "model.num_classes": "thing_classes",
    "model.sem_seg_head.num_classes": "stuff_classes",
}


class PredictionSettings(NamedTuple):
    """How images are read and resized for a model, and which classes it has."""

    dataset: str | None  # the first dataset to test on, whose metadata has the names of the classes
    dataset_key: str  # the config's key that names the dataset
    num_classes: dict[str, int]  # the model's number of "thing_classes" and of "stuff_classes"
    image_format: str  # a mode of PIL, or BGR
    augmentations: list[T.Augmentation]  # what resizes an image as in evaluation


def prediction_settings(cfg: Config) -> PredictionSettings:
    """The settings in ``cfg``.

    Raises:
        InputError: a lazy config has no dataloader.test.mapper that says how images are read.
    """
    if isinstance(cfg, CfgNode):
        heads = {"thing_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES, "stuff_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}
        learned = {field: number for _, number, field in checks.learned_classes(cfg)}
        dataset, resize = next(iter(cfg.DATASETS.TEST), None), build_augmentation(cfg, is_train=False)
        return PredictionSettings(dataset, "DATASETS.TEST", {**heads, **learned}, cfg.INPUT.FORMAT, resize)
    mapper = OmegaConf.select(cfg, "dataloader.test.mapper")
    if not mapper or "augmentations" not in mapper or "image_format" not in mapper:
        raise InputError(
            "the lazy config has no dataloader.test.mapper with image_format and augmentations, which say how images "
            "are read and resized for its model. Copy the one in Detectron2's configs/common/data/coco.py"
        )
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names") or []
    dataset = names if isinstance(names, str) else next(iter(names), None)
    num_classes = {field: number for _, number, field in _lazy_learned(cfg)}
    augmentations = list(instantiate(mapper.augmentations))
    return PredictionSettings(dataset, "dataloader.test.dataset.names", num_classes, mapper.image_format, augmentations)


def _lazy_learned(cfg):
    found = {key: OmegaConf.select(cfg, key) for key in _NUM_CLASSES}
    return [(key, number, _NUM_CLASSES[key]) for key, number in found.items() if isinstance(number, int)]


def check_test_classes(cfg: Config, settings: PredictionSettings) -> None:
    """Check that the model has as many classes as the dataset to test on. More are a warning.

    Raises:
        InputError: the dataset has more classes than the model; names the key and both numbers.
    """
    if isinstance(cfg, CfgNode):
        checks.check_classes(cfg, eval_only=True)
    elif settings.dataset is not None:
        for key, number, field in _lazy_learned(cfg):
            known = MetadataCatalog.get(settings.dataset).get(field)
            if known is not None:
                checks.compare_classes(key, number, field, settings.dataset, len(known))
