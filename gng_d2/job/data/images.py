"""Image files and annotations that cannot be read, named."""

from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from PIL import Image

from gng_d2.errors import InputError

__all__ = ["FILES", "NamingMapper", "read_labels"]

FILES = ("file_name", "sem_seg_file_name", "pan_seg_file_name")  # in a record of Detectron2


class NamingMapper:
    """Maps a record of a dataset as ``mapper`` does, and says which of its files is broken where that fails.

    Args:
        map_values: the number of classes in a semantic map, and the value of what is not annotated. Other values are
            refused. None: maps are not looked at.
    """

    def __init__(self, mapper: Callable[[dict], Any], map_values: tuple[int, int] | None = None):
        self.mapper, self.map_values = mapper, map_values

    def __call__(self, record: dict) -> Any:
        mapped = self._map(record)
        if self.map_values and isinstance(self.mapper, DatasetMapper) and "sem_seg" in mapped:
            _check_map(record["sem_seg_file_name"], mapped["sem_seg"], *self.map_values)
        return mapped

    def _map(self, record):
        try:
            return self.mapper(record)
        except SizeMismatchError as error:  # names its file
            raise InputError(" ".join(str(error).split())) from error
        except Exception as error:
            sizes = {key: read_labels(record[key]).shape[1::-1] for key in FILES if key in record}
            if isinstance(self.mapper, DatasetMapper) and len(set(sizes.values())) > 1:
                raise InputError(
                    "an image and its maps have one size: "
                    + ", ".join(f"{record[key]} is {width} x {height}" for key, (width, height) in sizes.items())
                ) from error
            if not isinstance(self.mapper, DatasetMapper) or "annotations" not in record:
                raise
            raise InputError(
                f"the annotations of the image {record.get('file_name')} cannot be used: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error


def read_labels(path: str, dtype=None) -> np.ndarray:
    """The pixels of an image file as they are stored, for instance the labels of a semantic map.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with PathManager.open(path, "rb") as file:
            return np.asarray(Image.open(file), dtype=dtype)
    except Exception as error:  # Pillow raises half a dozen kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or no image"
        raise InputError(f"the image {path} cannot be read: {reason}") from error


def _check_map(path, labels, num_classes, ignored):
    """Detectron2 would train on the grey levels of a coloured map, and count a class that there is not as another."""
    with PathManager.open(path, "rb") as file:
        mode = Image.open(file).mode
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignored)]
    if not mode.startswith(("L", "I")):
        problem = f"is not greyscale but of Pillow's mode {mode}"
    elif len(wrong):
        problem = f"has the value {int(wrong.min())}"
    else:
        return
    raise InputError(
        f"the semantic map {path} {problem}. It is a greyscale image whose values are the classes, 0 to "
        f"{num_classes - 1}, and {ignored} where nothing is annotated"
    )
