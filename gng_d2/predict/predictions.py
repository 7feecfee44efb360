"""A model's predictions on image files: find them, read them, run them in batches."""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from PIL import Image, UnidentifiedImageError
from torch import nn

from gng_d2.errors import InputError, abbreviated
from gng_d2.job.build import bind_remaining_norms
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.files import atomic_open
from gng_d2.models.fold import fold_weight_standardization

from .settings import PredictionSettings

__all__ = ["Prediction", "find_images", "load_model", "model_input", "output_names", "predict", "save_png"]
__all__ += ["set_threshold"]


class Prediction(NamedTuple):
    """What a model says on an image file; ``error`` says why it does not, and the rest is None."""

    path: str
    image: np.ndarray | None = None  # (H, W, 3), RGB
    output: dict | None = None  # as Detectron2's models return it, in the image's own size
    error: str | None = None


def load_model(model: nn.Module, weights: str) -> nn.Module:
    """``model`` with the file ``weights``, ready for inference: in eval mode, weight standardization folded.

    Raises:
        InputError: the file holds no weights of this model, or some that are no numbers.
    """
    bind_remaining_norms(model).eval()
    Checkpointer(model).load(weights)
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise InputError(f"{weights}: the weights {abbreviated(broken, most=1)} are not finite. Had its run diverged?")
    return fold_weight_standardization(model)


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Have a Detectron2 ``model`` leave out instances with a lower score, and no others."""
    for module in model.modules():
        for name in ("test_score_thresh", "combine_instances_score_thresh"):  # of heads; of a panoptic combination
            if hasattr(module, name):
                setattr(module, name, threshold)


def find_images(inputs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The files that a user's list of files, folders and patterns means, each once.

    Of a folder it takes all files but hidden ones, whatever they are called: only reading tells what is an image.

    Returns:
        The files, and for each of ``inputs`` without any the reason.
    """
    files, without = {}, {}
    for given in inputs:
        found, reason = [given], "not found"
        if os.path.isdir(given):
            found = [os.path.join(given, name) for name in sorted(os.listdir(given)) if not name.startswith(".")]
            reason = f"a folder without files. Those of its subfolders are '{os.path.join(given, '**', '*')}'"
        elif not os.path.lexists(given):
            found = sorted(glob.glob(given, recursive=True))
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            without[given] = reason
        for path in found:
            files.setdefault(os.path.realpath(path), path)
    return list(files.values()), without


def output_names(paths: Sequence[str]) -> dict[str, tuple[str, str]]:
    """For each image a name of its own and that of its picture, for instance ("a.jpg", "a.png").

    Images of one name in several folders keep their subfolders; images that differ in their ending alone keep it.
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
    """What Detectron2's models take, of an image in the config's format: resized as in its evaluation."""
    augmented = T.AugInput(image)
    T.AugmentationList(settings.augmentations)(augmented)
    resized = augmented.image.astype("float32").transpose(2, 0, 1)
    height, width = image.shape[:2]
    return {"image": torch.as_tensor(resized.copy()), "height": height, "width": width}


def predict(
    settings: PredictionSettings, model: nn.Module, paths: Sequence[str], batch_size: int = 1
) -> Iterator[Prediction]:
    """Run ``model`` on image files, and yield for each of them its prediction or what is wrong with it.

    A batch holds images of one size only: next to a larger one an image is padded, and a norm that computes its
    statistics over the padding too would give another output. So images may come in another order than ``paths``.
    """
    waiting: dict[tuple[int, ...], list] = {}
    for path in paths:
        try:
            image = read_image(path, settings.image_format)
            inputs = model_input(settings, image)
        except UnidentifiedImageError:
            yield Prediction(path, error="is no image, or of a format that PIL does not know")
            continue
        except Exception as error:  # broken files have raised a dozen kinds
            yield Prediction(path, error=f"cannot be read as an image: {_one_line(error)}")
            continue
        group = waiting.setdefault(inputs["image"].shape, [])
        group.append((path, convert_image_to_rgb(image, settings.image_format), inputs))
        if len(group) == batch_size or sum(map(len, waiting.values())) >= 4 * batch_size:
            yield from _predict_batch(model, waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
    for group in waiting.values():
        yield from _predict_batch(model, group)


def _predict_batch(model, group):
    outputs, reason = None, ""
    try:
        with torch.no_grad():
            outputs = model([inputs for _, _, inputs in group])
    except (RuntimeError, InputError) as error:  # too large for the memory, too small for the model
        reason = f"the model cannot take it: {_one_line(error)}"
    if outputs is not None:
        for (path, image, _), output in zip(group, outputs):
            yield Prediction(path, image, _on_cpu(output))
    elif len(group) == 1:
        yield Prediction(group[0][0], error=reason)
    else:
        for one in group:
            yield from _predict_batch(model, [one])


def save_png(picture: np.ndarray, path: str) -> None:
    """Write an (H, W, 3) RGB picture, whole or not at all, and make its folder if it is not there."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_open(path, "wb") as file:
        Image.fromarray(picture).save(file, "PNG")


def _on_cpu(output):
    moved = dict(output)
    if "panoptic_seg" in moved:
        segments, info = moved["panoptic_seg"]
        moved["panoptic_seg"] = segments.cpu(), info
    for key in {"instances", "sem_seg"} & set(moved):
        moved[key] = moved[key].to("cpu")
    return moved


def _one_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)
