"""Check before a run that the datasets fit the config and the model, and not in its first step or last evaluation."""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from gng_d2.errors import InputError, abbreviated, one_line
from gng_d2.job.weight_files import read_weight_file

from . import embedded
from .images import FILES, NamingMapper

# under these names the metadata of Detectron2's registrations have the files and folders that they read
_PATHS = ("image_root", "json_file", "panoptic_json", "panoptic_root", "sem_seg_root", "image_dir", "gt_dir", "dirname")

_FIRST = 10  # so many semantic maps of each test set are read before the training


def prepare_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """See that every dataset of the config is registered, has its files, and has the classes that the model learns.

    If the embedded dataset is missing, it is drawn.

    Raises:
        InputError: names the key and the dataset, and says how to mend it.
    """
    tested = {}
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            records = _prepare_dataset(f"DATASETS.{key}", name)
            if key == "TEST":
                tested[name] = records
        for path in cfg.DATASETS[f"PROPOSAL_FILES_{key}"] if cfg.MODEL.LOAD_PROPOSALS else ():
            try:
                read_weight_file(PathManager.get_local_path(path), pickled=True)  # Detectron2 unpickles it
            except InputError as error:
                raise InputError(f"DATASETS.PROPOSAL_FILES_{key}: {error}") from None
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty: name what to train on")
    check_classes(cfg, eval_only)
    for name, records in tested.items():
        _check_test_set(cfg, name, records)


def _check_test_set(cfg, name, records):
    """Look at what would be read for the first time after the training."""
    if isinstance(records, list):
        _check_annotations(cfg, "DATASETS.TEST", [name], _annotations(records))
    if map_values(cfg):
        mapper = NamingMapper(DatasetMapper(cfg, is_train=False), map_values(cfg))
        for record in itertools.islice(records, _FIRST):
            mapper(record)


def _prepare_dataset(key, name):
    """The records of a dataset if it is one to test on."""
    if name not in DatasetCatalog:
        raise InputError(
            f"{key}: no dataset named {name!r} is registered. Your own is registered by a module of yours: "
            f"--import FILE.py runs it first"
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
    # A test set would be loaded for the first time after the training. And where the metadata lack the names of the
    # classes, Detectron2 takes them from the COCO JSON when it loads it.
    if key == "DATASETS.TEST" or (metadata.get("json_file") and not metadata.get("thing_classes")):
        with naming_datasets(key, [name]):
            records = DatasetCatalog.get(name)
        for record in records if isinstance(records, list) else ():
            gone = [record[field] for field in FILES if field in record and not PathManager.exists(record[field])]
            if gone:
                raise InputError(f"{key}: the file {gone[0]} of dataset {name!r} is not there")
        return records
    return None


def check_classes(cfg: CfgNode, eval_only: bool = False) -> None:
    """Compare the numbers of classes and keypoints that the model learns with those that its datasets have.

    In training they must be equal, because a label beyond the model's counts as background, or as an index past the
    end. A dataset that only tests may have fewer classes, as the weights may have been made for more. Then there is a
    warning. A number that the metadata of a dataset do not tell is not compared.

    Raises:
        InputError: names the key, the dataset and both numbers.
    """
    names, ignored = [] if eval_only else list(cfg.DATASETS.TRAIN), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    for key, count, field in learned_classes(cfg):
        classes = {name: MetadataCatalog.get(name).get(field) for name in (*names, *cfg.DATASETS.TEST)}
        classes = {name: list(known) for name, known in classes.items() if known is not None}
        for name, known in classes.items():
            compare_classes(key, count, field, name, len(known), trains=name in names)
            first = next(iter(classes))
            if known != classes[first] and len(known) == len(classes[first]):
                logging.getLogger(__name__).warning(
                    f"DATASETS: {first!r} and {name!r} have other {field}, or the same in another order: "
                    f"{abbreviated(classes[first])} and {abbreviated(known)}"
                )
            label = MetadataCatalog.get(name).get("ignore_label", ignored)
            if field == "stuff_classes" and label != ignored:
                raise InputError(
                    f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignored}, but dataset {name!r} marks what is not annotated "
                    f"by {label} (its ignore_label). Set it to {label}"
                )


def learned_classes(cfg) -> Iterator[tuple[str, int, str]]:
    """What the model learns to tell apart: the key, its number, and the metadata of a dataset with as many entries."""
    model = cfg.MODEL
    architecture = META_ARCH_REGISTRY._obj_map.get(model.META_ARCHITECTURE)
    if isinstance(architecture, type):
        if issubclass(architecture, GeneralizedRCNN):
            yield "MODEL.ROI_HEADS.NUM_CLASSES", model.ROI_HEADS.NUM_CLASSES, "thing_classes"
        if issubclass(architecture, (PanopticFPN, SemanticSegmentor)):
            yield "MODEL.SEM_SEG_HEAD.NUM_CLASSES", model.SEM_SEG_HEAD.NUM_CLASSES, "stuff_classes"
    # the section RETINANET, and those of other projects such as FCOS, CENTERNET, SOLOV2
    used = {model.META_ARCHITECTURE.lower(), model.PROPOSAL_GENERATOR.NAME.lower()}
    for section, node in model.items():
        if section.lower() in used and isinstance(node, CfgNode) and isinstance(node.get("NUM_CLASSES"), int):
            yield f"MODEL.{section}.NUM_CLASSES", node.NUM_CLASSES, "thing_classes"
    if model.KEYPOINT_ON:
        yield "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, "keypoint_names"


def map_values(cfg: CfgNode) -> tuple[int, int] | None:
    """The number of classes in the semantic maps that the model learns from, and their value for "not annotated"; None
    for a model that learns from no maps."""
    counts = [count for _, count, field in learned_classes(cfg) if field == "stuff_classes"]
    return (counts[0], cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE) if counts else None


def compare_classes(key: str, count: int, field: str, name: str, known: int, trains: bool = False) -> None:
    """Compare ``count``, a model's number of classes by ``key``, with ``known``, that of the dataset ``name``, on which
    the model ``trains`` or is only tested."""
    message = f"{key} is {count}, but dataset {name!r} has {known} {field}. Set it to {known}"
    if count < known or (count != known and (trains or field == "keypoint_names")):
        raise InputError(message)
    if count > known:
        logging.getLogger(__name__).warning(f"{message}, unless the weights were made for {count}")


@contextmanager
def naming_datasets(key: str, names: Sequence[str], files: Sequence[str] = ()) -> Iterator[None]:
    """While datasets are loaded inside, an error in their files becomes an :class:`InputError` that names them.

    Args:
        key: of the config, such as "DATASETS.TRAIN".
        files: which are read; by default those with the instances.
    """
    try:
        yield
    except InputError:
        raise
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:  # of what a JSON lacks, say
        files = files or [path for name in names for path in [MetadataCatalog.get(name).get("json_file")] if path]
        kind = "" if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: "
        raise InputError(
            f"{key} {', '.join(names)}: {kind}{one_line(error)}{' in ' * bool(files)}{', '.join(files)}"
        ) from error


def check_records(cfg: CfgNode, records: Sequence[dict], mapper) -> None:
    """Refuse training data from which the model would learn nothing or something wrong.

    Only a list of records that Detectron2's own mapper takes is looked at.

    Raises:
        InputError: names the key, the datasets, and where one is at fault an image.
    """
    if not isinstance(records, list) or not isinstance(mapper, DatasetMapper):
        return
    where = f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)}"
    learned = {field for _, _, field in learned_classes(cfg)}
    annotations = _annotations(records)
    has = {"annotations": annotations, "sem_seg_file_name": any("sem_seg_file_name" in r for r in records)}
    for field, wanted in (("thing_classes", "annotations"), ("stuff_classes", "sem_seg_file_name")):
        if field in learned and not has[wanted]:
            raise InputError(f"{where}: no image has {wanted}, and {cfg.MODEL.META_ARCHITECTURE} learns from them")
    for key, wanted in (("MASK_ON", "segmentation"), ("KEYPOINT_ON", "keypoints")):
        # Detectron2's loaders leave out a segmentation that is empty
        without = [record for annotation, record in annotations if wanted not in annotation]
        if cfg.MODEL[key] and without:
            raise InputError(
                f"{where}: {len(without)} of {len(annotations)} annotations have no {wanted}, for instance one of "
                f"{without[0].get('file_name')}. Set MODEL.{key} to False, or add them"
            )
    _check_annotations(cfg, "DATASETS.TRAIN", cfg.DATASETS.TRAIN, annotations)


def _check_annotations(cfg, data_key, names, annotations):
    """See that boxes are boxes of their images, and of classes that the model learns."""
    with naming_datasets(data_key, names):
        for key, count, field in learned_classes(cfg):
            if field == "thing_classes":
                _check_boxes(f"{data_key} {', '.join(names)}", annotations, key, count)


def _annotations(records):
    """(annotation, its record) of each annotation that is no crowd."""
    return [(a, r) for r in records for a in r.get("annotations", ()) if not a.get("iscrowd", 0)]


def _check_boxes(where, annotations, key, count):
    outside = []
    for annotation, record in annotations:
        box, image = annotation.get("bbox"), record.get("file_name")
        if not hasattr(box, "__len__") or len(box) not in (4, 5):  # a rotated box is five numbers
            raise InputError(f"{where}: {image} has the bbox {box}; a box is four numbers")
        if not 0 <= annotation.get("category_id", 0) < count:
            raise InputError(
                f"{key} is {count}, but {image} in {where} has the category_id {annotation['category_id']}; they count "
                f"from 0 to {count - 1}"
            )
        if len(box) == 4 and not _is_in_image(box, annotation.get("bbox_mode"), record):
            outside.append(f"{list(box)} of {image}, {record.get('width')} x {record.get('height')}")
    if len(outside) > len(annotations) / 3:
        raise InputError(
            f"{where}: {len(outside)} of {len(annotations)} boxes are empty or end outside of their image, for "
            f"instance {outside[0]}. In a COCO JSON a bbox is [x, y, width, height]; in records of your own bbox_mode "
            f"says what its numbers are"
        )


def _is_in_image(box, mode, record):
    x, y, right, bottom = box
    if mode in (BoxMode.XYWH_ABS, BoxMode.XYWH_REL):
        right, bottom = x + right, y + bottom
    # 5 % more, because some annotators draw a little over the edge
    return x < right <= 1.05 * record.get("width", math.inf) and y < bottom <= 1.05 * record.get("height", math.inf)
