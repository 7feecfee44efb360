"""Read image files in the same way for training, evaluation and prediction, with errors that name the file."""

import logging
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data.detection_utils import SizeMismatchError, convert_PIL_to_numpy
from detectron2.data.detection_utils import read_image as detectron2s_read_image
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, ImageOps

from gng_d2.errors import InputError, one_line

FILES = ("file_name", "sem_seg_file_name", "pan_seg_file_name")  # keys of a Detectron2 record


def read_image(path: str, format: str | None = None) -> np.ndarray:
    """Detectron2's ``read_image``, which gives an (H, W, C) array of 0 to 255, but for two kinds of files.

    Of greyscale images with 16 bits the high bytes are taken, as PIL does for colour images with 16 bits. Detectron2
    makes all their values above 255 white. Of a file with several frames the first is read, and a warning says so.

    Raises:
        InputError: the pixels are floats or 32-bit integers, and nothing says which value is white.
    """
    with PathManager.open(path, "rb") as file:
        image = Image.open(file)
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones keep a preview in MPO files
            log_first_n(logging.WARNING, f"{path} has {image.n_frames} frames; only the first is used", key="message")
        # for some formats PIL puts 16 bits into its mode of 32
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            high_bytes = (np.asarray(ImageOps.exif_transpose(image)) >> 8).astype(np.uint8)
            return convert_PIL_to_numpy(Image.fromarray(high_bytes), format)
        if image.mode in ("I", "F"):
            kind = "floats" if image.mode == "F" else "32-bit integers"
            raise InputError(f"its pixels are {kind}, and nothing says which value is white. Save it with 8 or 16 bits")
    return detectron2s_read_image(path, format)


class NamingMapper:
    """Maps a record of a dataset as ``mapper`` does, but reads the image by :func:`read_image`. Where that fails, the
    error names the file that is broken.

    Args:
        map_values: the number of classes in a semantic map, and its value for "not annotated". Other values are
            refused. If it is None, maps are not looked at.
    """

    def __init__(self, mapper: Callable[[dict], Any], map_values: tuple[int, int] | None = None):
        self.mapper, self.map_values = mapper, map_values

    def __call__(self, record: dict) -> Any:
        mapped = self._map(record)
        if self.map_values and isinstance(self.mapper, DatasetMapper) and "sem_seg" in mapped:
            _check_map(record["sem_seg_file_name"], mapped["sem_seg"], *self.map_values)
        return mapped

    def _map(self, record):
        def read(path, format=None):  # a map is read by Detectron2, because its 16 bits are labels
            return (read_image if path == record["file_name"] else detectron2s_read_image)(path, format)

        try:
            with patch.object(detection_utils, "read_image", read):
                return self.mapper(record)
        except InputError as error:
            raise InputError(f"the image {record['file_name']} cannot be used: {error}") from error
        except SizeMismatchError as error:  # names its file
            raise InputError(one_line(error)) from error
        except Exception as error:  # a file that cannot be read is named by read_labels
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
                f"{one_line(error)}"
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
    """Refuse colours, of which Detectron2 would take the brightness for classes, and values that are no class."""
    with PathManager.open(path, "rb") as file:
        mode = Image.open(file).mode
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignored)]
    if mode != "L" and not mode.startswith("I"):
        problem = f"is not greyscale but of Pillow's mode {mode}"
    elif len(wrong):
        problem = f"has the value {int(wrong.min())}"
    else:
        return
    raise InputError(
        f"the semantic map {path} {problem}. It is a greyscale image whose values are the classes, 0 to "
        f"{num_classes - 1}, and {ignored} where nothing is annotated"
    )
