"""Every kind of image file that a user may have is read as Detectron2 reads it, or refused."""

import io
import logging
import os
import sys

import numpy as np
import pytest
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from PIL import Image, ImageCms

from command_line import run_tool
from gng_d2.errors import InputError
from gng_d2.job.data.images import NamingMapper, read_image
from gng_d2.predict.predictions import predict
from gng_d2.predict.settings import PredictionSettings

ROWS, COLUMNS = np.mgrid[:24, :32]
SMOOTH = np.stack([8 * COLUMNS, 10 * ROWS, 255 - 8 * COLUMNS], axis=-1).astype(np.uint8)
RGB = Image.fromarray(SMOOTH)
PROFILES = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
DEEP = (SMOOTH[..., 0].astype(np.uint16) << 8) + 77


SETTINGS = PredictionSettings(None, "DATASETS.TEST", {}, "BGR", [T.ResizeShortestEdge(16, 32)])


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm"])
@pytest.mark.parametrize("format", ["BGR", "L"])
def test_an_image_of_16_bits_has_the_values_of_its_high_bytes(name, format, tmp_path):
    Image.fromarray(DEEP).save(tmp_path / name)
    image = read_image(str(tmp_path / name), format)
    assert image.dtype == np.uint8 and image.shape == (24, 32, 1 if format == "L" else 3)
    assert (image == SMOOTH[..., :1]).all()


def test_an_image_of_16_bits_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(DEEP).save(tmp_path / "a.png", exif=exif)
    assert (read_image(str(tmp_path / "a.png"), "BGR")[..., 0] == np.rot90(SMOOTH[..., 0], -1)).all()


def test_training_and_evaluation_read_16_bits_alike_and_leave_labels(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "a.png")
    labels = np.full(DEEP.shape, 3, np.uint16)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {key: str(tmp_path / name) for key, name in (("file_name", "a.png"), ("sem_seg_file_name", "labels.png"))}
    mapped = NamingMapper(DatasetMapper(True, augmentations=[], image_format="L"))(record)
    assert (mapped["image"][0].numpy() == SMOOTH[..., 0]).all() and (mapped["sem_seg"].numpy() == labels).all()
    Image.fromarray((DEEP / 65535).astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif cannot be used: its pixels are floats"):
        NamingMapper(DatasetMapper(False, augmentations=[], image_format="L"))({"file_name": str(tmp_path / "a.tif")})


@pytest.mark.parametrize("values, what", [(DEEP / 65535, "floats"), (DEEP.astype(np.int32) * 99, "32-bit integers")])
def test_pixels_without_a_range_are_refused(values, what, tmp_path):
    path = str(tmp_path / "a.tif")
    Image.fromarray(values.astype(np.float32) if what == "floats" else values).save(path)
    with pytest.raises(InputError, match=f"its pixels are {what}, and nothing says which value is white. Save it"):
        read_image(path, "BGR")
    (prediction,) = predict(SETTINGS, None, [path])
    assert what in prediction.error


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "LAB", "YCbCr"])
def test_other_kinds_are_read_as_detectron2_reads_them(mode, tmp_path):
    path = str(tmp_path / {"CMYK": "a.jpg", "LAB": "a.tif", "YCbCr": "a.jpg"}.get(mode, "a.png"))
    (ImageCms.profileToProfile(RGB, *PROFILES, outputMode="LAB") if mode == "LAB" else RGB.convert(mode)).save(path)
    assert (read_image(path, "BGR") == detection_utils.read_image(path, "BGR")).all()
    if mode in ("RGBA", "P", "CMYK", "YCbCr"):  # the colours stay, but for a palette and JPEG
        assert np.abs(read_image(path, "RGB").astype(int) - SMOOTH).mean() < 20


@pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
def test_of_several_frames_the_first_is_read_with_a_warning(ending, tmp_path, caplog):
    path = str(tmp_path / f"a.{ending}")
    RGB.save(path, save_all=True, append_images=[Image.new("RGB", RGB.size)])
    with caplog.at_level(logging.WARNING, logger="gng_d2"):
        image = read_image(path, "RGB")
    assert np.abs(image.astype(int) - SMOOTH).mean() < 12
    assert [record.getMessage() for record in caplog.records] == [f"{path} has 2 frames; only the first is used"]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_the_smallest_and_the_thinnest(size, tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGB", size).save(path)
    (prediction,) = predict(SETTINGS, lambda inputs: [{}], [path])
    if size == (1, 1):
        assert prediction.image.shape == (1, 1, 3)
    else:
        assert prediction.error.startswith(f"{size[0]} x {size[1]} pixels cannot be resized as the config says")


def test_names_that_are_not_utf8_are_printed_as_they_are(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    run_tool(lambda: print(os.fsdecode(b"a\xff.png"), flush=True))
    assert stdout.buffer.getvalue() == b"a\xff.png\n"
