"""The channels in a group along the depth of a detector: what the name of a norm means in each layer.

With G = 32 a layer of 64 channels has 2 channels in a group, and a layer of 2048 channels has 64. What a group norm
does to the means of channels depends only on the channels in a group, so compare norms by that number.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby

from matplotlib.figure import Figure

from command_line import add_outputs
from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from gng_d2.job.files import prepare_outputs, save_figure
from gng_d2.models.norm_table import norm_table

from .rows import add_norms, markdown, write_rows

CONFIG = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
KEYS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
BOX_HEAD = ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_CONV", "4")


@dataclass(frozen=True)
class ChannelsRow:
    """One norm of the detector under one name."""

    norm: str
    layer: str  # the norm's path in the model
    part: str  # one of _PARTS
    channels_per_group: int


def measure(norms: list[str]) -> list[ChannelsRow]:
    """The channels in a group of each layer of Faster R-CNN R-50-FPN under each of ``norms``, from input to output."""
    rows = []
    for norm in norms:
        words = [*BOX_HEAD, *(word for key in KEYS for word in (key, norm))]
        found = norm_table(build_on_meta(load_config(CONFIG, words)))
        if any(row.channels_per_group is None for row in found):
            raise InputError(f"--norms: {norm} has no one number of channels in a group")
        of_norm = [ChannelsRow(norm, row.name, _part(row.name), row.channels_per_group) for row in found]
        rows += sorted(of_norm, key=lambda row: _PARTS.index(row.part))  # the FPN is built before the backbone
    return rows


_PARTS = ["stem", "res2", "res3", "res4", "res5", "FPN", "box head"]


def _part(name):
    words = name.split(".")
    return next((part for part in _PARTS if part in words), "box head" if "roi_heads" in words else "FPN")


def draw(rows: list[ChannelsRow], path: str) -> None:
    """Draw the channels in a group over the layers, with a curve for each norm."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.add_subplot()
    by_norm = _by_norm(rows)
    for (norm, layers), style in zip(by_norm.items(), ("o-", "s-", "^-", "D-", "v-", "x-")):
        channels = [row.channels_per_group for row in layers]
        axes.plot(channels, style, label=norm, markersize=4, linewidth=1, alpha=0.8)
    start = 0
    for number, (part, layers) in enumerate(groupby(row.part for row in next(iter(by_norm.values())))):
        end = start + len(list(layers))
        axes.axvspan(start - 0.5, end - 0.5, color="0.5", alpha=0.12 * (number % 2), linewidth=0)
        axes.text((start + end - 1) / 2, 1.02, part, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
        start = end
    axes.set_yscale("log", base=2)
    axes.set(xlabel="layer of Faster R-CNN R-50-FPN", ylabel="channels in a group (1: instance norm)")
    axes.set_yticks([4**power for power in range(6)], [4**power for power in range(6)])
    axes.margins(x=0.01)
    axes.legend(loc="upper left")
    save_figure(figure, path, dpi=110)


def table(rows: list[ChannelsRow]) -> str:
    """A table that says, for each norm, how many layers have how many channels in a group."""
    lines = []
    for norm, layers in _by_norm(rows).items():
        counts = sorted(Counter(row.channels_per_group for row in layers).items())
        lines.append([norm, ", ".join(f"{channels} ({count})" for channels, count in counts)])
    return markdown(lines, ["norm", "channels in a group (layers)"])


def _by_norm(rows):
    return {norm: list(of_norm) for norm, of_norm in groupby(rows, key=lambda row: row.norm)}


def add_arguments(parser) -> None:
    add_norms(parser, "GN", "GN1", "GN/16", "PGN")
    add_outputs(parser, json="write a row for each norm and layer", plot="draw channels in a group over the layers")


def main(args) -> None:
    prepare_outputs(args.json, args.plot)
    rows = measure(args.norms)
    write_rows(args.json, rows)
    if args.plot:
        draw(rows, args.plot)
    print(table(rows))
