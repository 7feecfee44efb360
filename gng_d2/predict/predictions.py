"""Find image files, read them, and run a model on them in batches."""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image, UnidentifiedImageError
from torch import nn

from gng_d2.errors import InputError
from gng_d2.job.data.images import read_image
from gng_d2.job.files import atomic_open

from .settings import PredictionSettings


class Prediction(NamedTuple):
    """What a model predicts for an image file; or the ``error`` that is why there is no image and no output."""

    path: str
    image: np.ndarray | None = None  # (H, W, 3), RGB
    output: dict | None = None  # as Detectron2's models return it for the image's own size, on the CPU
    error: str | None = None


def find_images(inputs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The image files in a list of files, folders and patterns, each file once.

    Of a folder all files are taken except hidden ones. Their endings do not matter, because only reading a file shows
    whether it is an image.

    Returns:
        The files, and the inputs that name no file with the reason of each.
    """
    files, without = {}, {}
    for given in inputs:
        found, reason = [given], "not found"
        if os.path.isdir(given):
            found = [os.path.join(given, name) for name in sorted(os.listdir(given)) if not name.startswith(".")]
            reason = f"a folder without files. '{os.path.join(given, '**', '*')}' takes those of its subfolders"
        elif not os.path.lexists(given):
            found = sorted(glob.glob(given, recursive=True))
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            without[given] = reason
        for path in found:
            files.setdefault(os.path.realpath(path), path)
    return list(files.values()), without


def output_names(paths: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A unique name for each image and one for its picture, for instance ("a.jpg", "a.png").

    If two images have the same name, the names include the subfolders. If two differ only in their ending, the names of
    the pictures include the ending ("a.jpg.png").
    """
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):
        whole = [os.path.abspath(path) for path in paths]
        root = os.path.commonpath([os.path.dirname(path) for path in whole])
        names = [os.path.relpath(path, root) for path in whole]
    stems = [os.path.splitext(name)[0] for name in names]
    if len(set(stems)) < len(stems):
        stems = names
    return {path: (name, f"{stem}.png") for path, name, stem in zip(paths, names, stems)}


def model_input(settings: PredictionSettings, image: np.ndarray) -> dict:
    """The input of a Detectron2 model for an (H, W, C) image in the config's format, resized as in evaluation.

    Raises:
        InputError: a side of the resized image would have no pixels.
    """
    height, width = image.shape[:2]
    augmented = T.AugInput(image)
    try:
        T.AugmentationList(settings.augmentations)(augmented)
    except ValueError as error:
        raise InputError(f"{width} x {height} pixels cannot be resized as the config says: {error}") from error
    resized = augmented.image.astype("float32").transpose(2, 0, 1)
    return {"image": torch.as_tensor(resized.copy()), "height": height, "width": width}


def predict(
    settings: PredictionSettings, model: nn.Module, paths: Sequence[str], batch_size: int = 1
) -> Iterator[Prediction]:
    """Run ``model`` on image files, and yield the prediction for each file, or what is wrong with the file.

    The images of a batch have the same size. Detectron2 pads an image that is next to a larger one, and a norm whose
    statistics include the padding would give another output. So the order may differ from that of ``paths``.
    """
    waiting: dict[tuple[int, ...], list] = {}
    for path in paths:
        try:
            image = read_image(path, settings.image_format)
            inputs = model_input(settings, image)
        except Exception as error:  # broken files raise errors of many kinds
            reason = str(error) if isinstance(error, InputError) else f"cannot be read as an image: {_one_line(error)}"
            if isinstance(error, UnidentifiedImageError):
                reason = "is no image, or of a format that PIL does not know"
            yield Prediction(path, error=reason)
            continue
        group = waiting.setdefault(inputs["image"].shape, [])
        group.append((path, detection_utils.convert_image_to_rgb(image, settings.image_format), inputs))
        if len(group) == batch_size or sum(map(len, waiting.values())) >= 4 * batch_size:
            yield from _predict_batch(model, waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
    for group in waiting.values():
        yield from _predict_batch(model, group)


def _predict_batch(model, group):
    reason = None
    try:
        with torch.no_grad():
            outputs = model([inputs for _, _, inputs in group])
    except (RuntimeError, InputError) as error:  # an image is too large for the memory, or too small for the model
        reason = f"the model cannot take it: {_one_line(error)}"
    if reason is None:
        for (path, image, _), output in zip(group, outputs):
            yield Prediction(path, image, _on_cpu(output))
    elif len(group) == 1:
        yield Prediction(group[0][0], error=reason)
    else:
        for one in group:
            yield from _predict_batch(model, [one])


def save_png(picture: np.ndarray, path: str) -> None:
    """Write an (H, W, 3) RGB picture, whole or not at all. Its folder is made if there is none."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_open(path, "wb") as file:
        Image.fromarray(picture).save(file, "PNG")


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Make a Detectron2 ``model`` leave out the instances whose score is below ``threshold``, and no others."""
    for module in model.modules():
        # heads have the first, panoptic models the second
        for name in ("test_score_thresh", "combine_instances_score_thresh"):
            if hasattr(module, name):
                setattr(module, name, threshold)


def _on_cpu(output):
    moved = {name: value.to("cpu") for name, value in output.items() if name in ("instances", "sem_seg")}
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        moved["panoptic_seg"] = segments.cpu(), info
    return output | moved


def _one_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)
