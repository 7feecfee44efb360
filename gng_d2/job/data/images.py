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
    """Maps a record of a dataset as ``mapper`` does, and says which of its files is broken where that fails."""

    def __init__(self, mapper: Callable[[dict], Any]):
        self.mapper = mapper

    def __call__(self, record: dict) -> Any:
        try:
            return self.mapper(record)
        except SizeMismatchError as error:  # names its file
            raise InputError(" ".join(str(error).split())) from error
        except Exception as error:
            for path in (record[key] for key in FILES if key in record):
                read_labels(path)
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
