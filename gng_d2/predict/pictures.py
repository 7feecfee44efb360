"""Pictures of what a model predicts, and of its groups along the depth."""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata, MetadataCatalog
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.figure import Figure
from torch import nn

from gng_d2.groups import GROUP_CHOICES, isometry_ratio
from gng_d2.job.data.images import NamingMapper, read_image
from gng_d2.job.files import save_figure
from gng_d2.models.norm_table import NormRow


def draw_output(
    image: np.ndarray, output: dict, metadata: Metadata, scale: float = 1.0, threshold: float = 0.5
) -> np.ndarray:
    """Draw a Detectron2 model's output for an image: the panoptic segmentation if there is one, otherwise the semantic
    segmentation and the instances.

    Args:
        image: (H, W, 3) uint8, RGB.
        scale: how many times as large as the image the picture is.
        threshold: instances with a lower score are not drawn. A panoptic segmentation is drawn whole, because its model
            has already left out instances with low scores.

    Returns:
        The picture, (H', W', 3), RGB.
    """
    visualizer = Visualizer(image, metadata, scale, ColorMode.SEGMENTATION)
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        return visualizer.draw_panoptic_seg_predictions(segments.cpu(), info).get_image()
    drawn = visualizer.get_output()
    if "sem_seg" in output:
        drawn = visualizer.draw_sem_seg(output["sem_seg"].argmax(dim=0).cpu())
    if "instances" in output:
        instances = output["instances"].to("cpu")
        drawn = visualizer.draw_instance_predictions(instances[instances.scores >= threshold])
    return drawn.get_image()


def draw_validation(cfg: CfgNode, model: nn.Module, path: str) -> None:
    """Write a picture in which each of the first five images of DATASETS.TEST has a row: the image, its ground truth,
    and what ``model`` predicts."""
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
    records, panoptic = DatasetCatalog.get(name)[:5], {}
    if metadata.get("panoptic_json"):  # the records to evaluate on lack the panoptic ground truth
        paths = metadata.panoptic_json, metadata.image_root, metadata.panoptic_root
        panoptic = {record["image_id"]: record for record in load_coco_panoptic_json(*paths, metadata.as_dict())}
    figure = Figure(figsize=(12, 4 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), 3, squeeze=False)
    model.eval()
    for row, record in zip(axes, records):
        image = read_image(record["file_name"], "RGB")
        scale = max(1.0, 512 / min(image.shape[:2]))
        truth = Visualizer(image, metadata, scale, ColorMode.SEGMENTATION)
        with torch.no_grad():
            output = model([mapper(record)])[0]
        row[0].imshow(image)
        row[1].imshow(truth.draw_dataset_dict(panoptic.get(record.get("image_id"), record)).get_image())
        row[2].imshow(draw_output(image, output, metadata, scale))
    for title, top in zip(("image", "ground truth", "prediction"), axes[0]):
        top.set_title(title)
    for panel in axes.flat:
        panel.set_axis_off()
    save_figure(figure, path, dpi=80)


def plot_groups(rows: Sequence[NormRow], path: str) -> None:
    """Draw two panels along the depth of a model, from the rows of :func:`gng_d2.models.norm_table.norm_table`. One has
    the numbers of groups and of channels. The other has the ratio K that GN (32 groups), GN1 and PGN would give to each
    norm that has groups."""
    rows = [row for row in rows if row.n_in is not None]
    depth = range(len(rows))
    figure = Figure(figsize=(max(8, 0.16 * len(rows)), 8), layout="constrained")
    groups, ratio = figure.subplots(2, 1, sharex=True)
    groups.step(depth, [row.n_out for row in rows], where="mid", color="0.8", label="output channels")
    norms = sorted({row.norm for row in rows})
    for norm in norms:
        at = [i for i in depth if rows[i].norm == norm and rows[i].num_groups]
        if at:
            groups.plot(at, [rows[i].num_groups for i in at], "o", ms=4, label=f"groups, {norm}")
    groups.set_yscale("log", base=2)
    groups.set_ylabel("number of groups")
    groups.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8)
    without = [norm for norm in norms if not any(r.num_groups for r in rows if r.norm == norm)]
    if without:
        groups.set_title(f"no groups: {', '.join(without)}", fontsize=9, loc="right")

    for (name, choose), marker, fill in zip(GROUP_CHOICES.items(), "s^o", ("C0", "C1", "none")):
        points = [(i, choose(row.n_in, row.n_out)) for i, row in enumerate(rows) if row.num_groups]
        points = [(i, isometry_ratio(rows[i].n_in, rows[i].n_out, g)) for i, g in points if g]
        if points:
            ratio.plot(*zip(*points), marker, ms=7 if fill == "none" else 4, mfc=fill, label=name)
    ratio.axhline(1, color="0.5", lw=0.8)
    ratio.set_yscale("log", base=2)
    ratio.set_ylabel("K, the paper's gradient ratio\n(1 is isometric)")
    if ratio.get_legend_handles_labels()[0]:
        ratio.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    for axes in (groups, ratio):
        axes.yaxis.set_major_formatter("{x:g}")
    ratio.set_xticks(depth, [row.name.removesuffix(".norm") for row in rows], rotation=90, fontsize=6)
    save_figure(figure, path, dpi=120)
