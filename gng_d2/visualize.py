"""Pictures of what a model sees, drawn with Detectron2's visualizer."""

import json
import os
from typing import Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata, MetadataCatalog  # noqa: E402
from detectron2.data.detection_utils import read_image  # noqa: E402
from detectron2.utils.visualizer import ColorMode, Visualizer  # noqa: E402
from torch import nn  # noqa: E402

__all__ = ["draw_output", "draw_validation"]


def draw_output(image: np.ndarray, output: dict, metadata: Metadata) -> np.ndarray:
    """Draw what Detectron2's model returned for ``image`` ((H, W, 3) uint8 RGB): the panoptic segmentation
    if it made one, else the semantic one and the instances. Returns an RGB picture of at least 512 pixels."""
    visualizer = Visualizer(image, metadata, _scale(image), ColorMode.SEGMENTATION)
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        return visualizer.draw_panoptic_seg_predictions(segments.cpu(), info).get_image()
    drawn = visualizer.get_output()
    if "sem_seg" in output:
        drawn = visualizer.draw_sem_seg(output["sem_seg"].argmax(dim=0).cpu())
    if "instances" in output:
        instances = output["instances"].to("cpu")
        drawn = visualizer.draw_instance_predictions(instances[instances.scores >= 0.5])
    return drawn.get_image()


def draw_validation(cfg: CfgNode, model: nn.Module, path: str, count: int = 5) -> None:
    """Write a picture with a row for each of the first ``count`` images of DATASETS.TEST: the image, its
    ground truth, and what ``model`` predicts."""
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    mapper = DatasetMapper(cfg, is_train=False)
    records = DatasetCatalog.get(name)[:count]
    figure, axes = plt.subplots(len(records), 3, figsize=(12, 4 * len(records)), layout="constrained", squeeze=False)
    model.eval()
    for row, record in zip(axes, records):
        image = read_image(record["file_name"], "RGB")
        with torch.no_grad():
            output = model([mapper(record)])[0]
        row[0].imshow(image)
        row[1].imshow(_draw_truth(image, record, metadata))
        row[2].imshow(draw_output(image, output, metadata))
    for title, top in zip(("image", "ground truth", "prediction"), axes[0]):
        top.set_title(title)
    for panel in axes.flat:
        panel.set_axis_off()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _scale(image):
    return max(1.0, 512 / min(image.shape[:2]))


def _draw_truth(image, record, metadata):
    visualizer = Visualizer(image, metadata, _scale(image), ColorMode.SEGMENTATION)
    truth = _panoptic_truth(record, metadata)
    if truth is None:
        return visualizer.draw_dataset_dict(record).get_image()
    return visualizer.draw_panoptic_seg(*truth).get_image()


def _panoptic_truth(record, metadata) -> Optional[tuple]:
    """(segment ids, segments info) with contiguous categories; None for a dataset that is not panoptic."""
    if metadata.get("panoptic_json") is None:
        return None
    with open(metadata.panoptic_json) as file:
        annotations = json.load(file)["annotations"]
    annotation = next(a for a in annotations if a["image_id"] == record["image_id"])
    rgb = read_image(os.path.join(metadata.panoptic_root, annotation["file_name"]), "RGB").astype(np.int64)
    info = []
    for segment in annotation["segments_info"]:
        things = metadata.thing_dataset_id_to_contiguous_id
        isthing = segment["category_id"] in things
        category = (things if isthing else metadata.stuff_dataset_id_to_contiguous_id)[segment["category_id"]]
        info.append({"id": segment["id"], "isthing": isthing, "category_id": category})
    return torch.as_tensor(rgb @ [1, 256, 256**2]), info
