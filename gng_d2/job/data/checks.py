"""Datasets that fit the config and the model: refused before a run, not in its first step or last evaluation."""

import difflib
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from gng_d2.errors import InputError
from gng_d2.job.weight_files import read_weight_file

from . import embedded
from .images import FILES, NamingMapper

__all__ = [
    "prepare_datasets",
    "check_classes",
    "check_records",
    "compare",
    "learned_classes",
    "map_values",
    "naming_datasets",
]

# where Detectron2's registrations keep what they read
_PATHS = ("image_root", "json_file", "panoptic_json", "panoptic_root", "sem_seg_root", "image_dir", "gt_dir", "dirname")

_FIRST = 10  # records of a test set, of which the maps are read before the training


def prepare_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """See that every dataset of the config is registered, is there and has the classes that the model learns.

    The embedded dataset is drawn where it is missing.

    Raises:
        InputError: names the key and the dataset, and how to mend it.
    """
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            _prepare_dataset(f"DATASETS.{key}", name)
        for path in cfg.DATASETS[f"PROPOSAL_FILES_{key}"] if cfg.MODEL.LOAD_PROPOSALS else ():
            try:
                read_weight_file(PathManager.get_local_path(path), pickled=True)  # Detectron2 unpickles it
            except InputError as error:
                raise InputError(f"DATASETS.PROPOSAL_FILES_{key}: {error}") from None
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty: name what to train on")
    check_classes(cfg, eval_only)
    if map_values(cfg):  # the maps of the test set would be met after the training
        mapper = NamingMapper(DatasetMapper(cfg, is_train=False), map_values(cfg))
        for name in cfg.DATASETS.TEST:
            for record in itertools.islice(DatasetCatalog.get(name), _FIRST):
                mapper(record)


def _prepare_dataset(key, name):
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list(), 1)
        raise InputError(
            f"{key}: no dataset named {name!r} is registered"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + " Your own is registered by a module of yours: --import FILE.py runs it first"
        )
    if name.startswith(embedded.NAME):
        embedded.draw_if_missing()
    metadata = MetadataCatalog.get(name)
    for field in _PATHS:
        path = metadata.get(field)
        if path and not PathManager.exists(path):
            raise InputError(
                f"{key}: the {field} of dataset {name!r} is not there: {path}. Datasets are looked for in "
                f"{embedded.datasets_root().resolve()}; the environment variable DETECTRON2_DATASETS sets that folder"
            )
    # What is else loaded for the last evaluation alone; and a COCO JSON that alone names the classes, which become
    # metadata when it is loaded
    if key == "DATASETS.TEST" or (metadata.get("json_file") and not metadata.get("thing_classes")):
        with naming_datasets(key, [name]):
            records = DatasetCatalog.get(name)
        for record in records if isinstance(records, list) else ():
            gone = [record[field] for field in FILES if field in record and not PathManager.exists(record[field])]
            if gone:
                raise InputError(f"{key}: the file {gone[0]} of dataset {name!r} is not there")


def check_classes(cfg: CfgNode, eval_only: bool = False) -> None:
    """Compare the numbers of classes and keypoints that the model learns with those that its datasets have.

    The numbers have to be the same in training: labels beyond the model's are taken for its background, or index past
    the end. A dataset that only tests may have fewer, for which weights of more classes are a warning. What a dataset
    does not tell is not compared.

    Raises:
        InputError: names the key, the dataset and both numbers.
    """
    names = [] if eval_only else list(cfg.DATASETS.TRAIN)
    for key, count, field in learned_classes(cfg):
        _check_same(names, field)
        for name in dict.fromkeys([*names, *cfg.DATASETS.TEST]):
            known = MetadataCatalog.get(name).get(field)
            if known is not None:
                compare(key, count, field, name, len(known), trains=name in names)
                difference = _difference([*names[:1], name], field)
                if difference and len(known) == count:
                    logging.getLogger(__name__).warning(f"DATASETS.TEST: {difference}")
    _check_labels(cfg, names)


def _check_labels(cfg, names):
    """Keypoints that are mirrored alike and have names, and the label of what is not annotated."""
    if cfg.MODEL.KEYPOINT_ON:
        _check_same(names, "keypoint_flip_map")
        for name in names:
            if not MetadataCatalog.get(name).get("keypoint_names"):
                raise InputError(f"MODEL.KEYPOINT_ON: the metadata of dataset {name!r} has no keypoint_names")
    if any(field == "stuff_classes" for _, _, field in learned_classes(cfg)):
        for name in dict.fromkeys([*names, *cfg.DATASETS.TEST]):
            label, ignored = MetadataCatalog.get(name).get("ignore_label"), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
            if label is not None and label != ignored:
                raise InputError(
                    f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignored}, but dataset {name!r} marks what is not annotated "
                    f"by {label} (its ignore_label). Set it to {label}"
                )


def learned_classes(cfg) -> Iterator[tuple[str, int, str]]:
    """(key, its number, metadata of a dataset that has as many entries) of what the model learns."""
    model = cfg.MODEL
    architecture = META_ARCH_REGISTRY._obj_map.get(model.META_ARCHITECTURE)
    if isinstance(architecture, type):
        if issubclass(architecture, GeneralizedRCNN):
            yield "MODEL.ROI_HEADS.NUM_CLASSES", model.ROI_HEADS.NUM_CLASSES, "thing_classes"
        if issubclass(architecture, (PanopticFPN, SemanticSegmentor)):
            yield "MODEL.SEM_SEG_HEAD.NUM_CLASSES", model.SEM_SEG_HEAD.NUM_CLASSES, "stuff_classes"
    # RETINANET, and FCOS, CENTERNET or SOLOV2 of other projects
    used = {model.META_ARCHITECTURE.lower(), model.PROPOSAL_GENERATOR.NAME.lower()}
    for section, node in model.items():
        if section.lower() in used and isinstance(node, CfgNode) and isinstance(node.get("NUM_CLASSES"), int):
            yield f"MODEL.{section}.NUM_CLASSES", node.NUM_CLASSES, "thing_classes"
    if model.KEYPOINT_ON:
        yield "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, "keypoint_names"


def map_values(cfg: CfgNode) -> tuple[int, int] | None:
    """The number of classes in the semantic maps that the model learns from, and the value of what is not annotated."""
    counts = [count for _, count, field in learned_classes(cfg) if field == "stuff_classes"]
    return (counts[0], cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE) if counts else None


def compare(key: str, count: int, field: str, name: str, known: int, trains: bool = False) -> None:
    """Compare the ``count`` of classes that a model has by ``key`` with those ``known`` of the dataset ``name``, on
    which it ``trains`` or is only tested."""
    message = f"{key} is {count}, but dataset {name!r} has {known} {field}. Set it to {known}"
    if count < known or (count != known and (trains or field == "keypoint_names")):
        raise InputError(message)
    if count > known:
        logging.getLogger(__name__).warning(f"{message}, unless the weights were made for {count}")


def _check_same(names, field):
    difference = _difference(names, field)
    if difference:
        raise InputError(f"DATASETS.TRAIN: {difference}, and Detectron2 trains on them as on one dataset")


def _difference(names, field):
    """How the classes of the first of the datasets ``names`` differ from another's, as far as they tell."""
    expected, first = MetadataCatalog.get(names[0]).get(field) if names else None, names[:1]
    for name in names[1:] if expected is not None else ():
        entries = MetadataCatalog.get(name).get(field)
        if entries is not None and list(entries) != list(expected):
            index, pair = next((i, p) for i, p in enumerate(itertools.zip_longest(expected, entries)) if p[0] != p[1])
            return (
                f"{first[0]!r} and {name!r} have different {field}: {len(expected)} and {len(entries)}, the first "
                f"difference is {pair[0]!r} and {pair[1]!r} at {index}"
            )
    return None


@contextmanager
def naming_datasets(key: str, names: Sequence[str]) -> Iterator[None]:
    """Turns what goes wrong with a dataset's files while Detectron2 loads it into an :class:`InputError` that names it.

    Args:
        key: of the config, such as "DATASETS.TRAIN".
    """
    try:
        yield
    except InputError:
        raise
    except (AssertionError, ValueError, LookupError) as error:  # LookupError: what a JSON lacks
        files = [path for name in names for path in [MetadataCatalog.get(name).get("json_file")] if path]
        kind = "" if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: "
        message = " ".join(str(error).split())
        raise InputError(
            f"{key} {', '.join(names)}: {kind}{message}{' in ' * bool(files)}{', '.join(files)}"
        ) from error


def check_records(cfg: CfgNode, records: Sequence[dict], mapper) -> None:
    """Refuse training data from which the model would learn nothing, or with labels that it does not have.

    Raises:
        InputError: names the key, the datasets and for a label an image.
    """
    if not isinstance(records, list):
        return  # a user's own dataset
    learned = {field: (key, count) for key, count, field in learned_classes(cfg)}
    names = ", ".join(cfg.DATASETS.TRAIN)
    annotations = [(a, r) for r in records for a in r.get("annotations", ()) if not a.get("iscrowd", 0)]
    if isinstance(mapper, DatasetMapper):  # another may find them elsewhere
        has = {"annotations": annotations, "sem_seg_file_name": any("sem_seg_file_name" in r for r in records)}
        for field, wanted in (("thing_classes", "annotations"), ("stuff_classes", "sem_seg_file_name")):
            if field in learned and not has[wanted]:
                raise InputError(
                    f"DATASETS.TRAIN {names}: no image has {wanted}, and {cfg.MODEL.META_ARCHITECTURE} learns from them"
                )
        _check_heads(cfg, names, annotations)
    for annotation, record in annotations if "thing_classes" in learned else ():
        box, (key, count), image = annotation.get("bbox"), learned["thing_classes"], record.get("file_name")
        if isinstance(mapper, DatasetMapper) and (not hasattr(box, "__len__") or len(box) not in (4, 5)):  # 5: rotated
            raise InputError(f"DATASETS.TRAIN {names}: {image} has the bbox {box}; four numbers are one")
        if not 0 <= annotation.get("category_id", 0) < count:
            raise InputError(
                f"{key} is {count}, but {image} in DATASETS.TRAIN {names} has the category_id "
                f"{annotation['category_id']}; they count from 0 to {count - 1}"
            )
    if annotations and not any(_has_area(a) for a, _ in annotations):
        raise InputError(
            f"DATASETS.TRAIN {names}: each of the {len(annotations)} boxes is empty, for instance "
            f"{list(annotations[0][0]['bbox'])} of {annotations[0][1].get('file_name')}. Is their bbox_mode right?"
        )


def _check_heads(cfg, names, annotations):
    """The loaders of Detectron2 leave out a segmentation that is empty."""
    for key, wanted in (("MASK_ON", "segmentation"), ("KEYPOINT_ON", "keypoints")):
        without = [record for annotation, record in annotations if wanted not in annotation]
        if cfg.MODEL[key] and without:
            raise InputError(
                f"DATASETS.TRAIN {names}: {len(without)} of {len(annotations)} annotations have no {wanted}, for "
                f"instance one of {without[0].get('file_name')}. Set MODEL.{key} to False, or add them"
            )


def _has_area(annotation):
    box: list[float] = annotation.get("bbox") or [0, 0, 1, 1]
    if annotation.get("bbox_mode") in (BoxMode.XYXY_ABS, BoxMode.XYXY_REL):
        return box[2] > box[0] and box[3] > box[1]
    return box[2] > 0 and box[3] > 0
