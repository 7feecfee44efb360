"""What is left of a trained network when its batch norms become group norms, before any training.

The network is MobileNetV2 with ImageNet weights. A linear head is trained on its features of Caltech-101, with 20
images of each class, and tested on 10 other images of each class. Then every norm is replaced, and nothing in the
network is trained. The old head is tested on the features that are left (columns "old head"), and so is a new linear
head that is trained on them (columns "new head"). The affine of the new norms is fresh (weight 1, bias 0), kept (batch
norm's own), or calibrated by calibrate_norms on unlabelled images of the training half. A seed draws the images of both
halves.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from command_line import add_outputs, count
from gng_d2 import calibrate_norms, convert_norms
from gng_d2.job.files import prepare_outputs, save_figure

from .intervals import half_interval, mean_with_interval
from .pretrained import (
    add_data,
    features,
    linear_head,
    load_mobilenet,
    normalized,
    right,
    split,
)
from .rows import add_norms, machine, markdown, rows_to_keep, write_rows

BATCH_NORM = "BN"
AFFINES = ("fresh", "kept", "calibrated")
IMAGES = 64


@dataclass(frozen=True)
class RetentionRow:
    """The results of one network whose norms were replaced."""

    norm: str
    affine: str
    images: int  # how many images it was calibrated on
    seed: int
    image_size: int
    old_head: float  # test images that are labelled rightly, in %
    new_head: float | None
    last_error: float | None  # the calibration error of the last norm
    machine: str


def replaced(reference: nn.Module, norm: str, affine: str, inputs) -> nn.Module:
    """A copy of ``reference`` in which every norm is ``norm``, with an affine that is one of AFFINES."""
    model = convert_norms(copy.deepcopy(reference), norm, inputs[:1])
    if affine == "calibrated":
        calibrate_norms(model, reference, inputs)
    elif affine == "kept":
        model.load_state_dict(reference.state_dict(), strict=False)
    return model


def _cases(args) -> Iterator[tuple[str, str, int]]:
    """(norm, affine, images) of the rows of a seed."""
    yield BATCH_NORM, "trained", 0
    yield from (
        (norm, affine, IMAGES * (affine == "calibrated")) for affine in reversed(AFFINES) for norm in args.norms
    )
    yield from ((norm, "calibrated", images) for images in args.images if images != IMAGES for norm in args.norms)


def _measure(args, seed, done) -> Iterator[RetentionRow]:
    cases = [case for case in _cases(args) if (*case, seed) not in done]
    if not cases:
        return
    reference = load_mobilenet(args.weights)
    images = split(args.data, args.image_size, seed)
    order = np.random.default_rng(seed).permutation(len(images.train))  # unlabelled: any classes
    head = linear_head(features(reference, images.train), images.train_labels)
    for norm, affine, number in cases:
        model, last = reference, None
        if norm != BATCH_NORM:
            model = replaced(reference, norm, affine, normalized(images.train[order[: max(number, 1)]]))
            last = [m.calibration_error for m in model.modules() if getattr(m, "calibration_error", None) is not None]
        found, new_head = features(model, images.test), None
        if norm != BATCH_NORM and number in (0, IMAGES):
            new_head = right(linear_head(features(model, images.train), images.train_labels), found, images.test_labels)
        yield RetentionRow(
            norm=norm,
            affine=affine,
            images=number,
            seed=seed,
            image_size=args.image_size,
            old_head=right(head, found, images.test_labels),
            new_head=new_head,
            last_error=last[-1] if last else None,
            machine=machine(),
        )


def table(rows: list[RetentionRow]) -> str:
    """A table with a line for each norm, and one over the number of images for calibration if there are several."""
    norms = [norm for norm in dict.fromkeys(row.norm for row in rows) if norm != BATCH_NORM]

    def cell(norm, affine, head="old_head", images=None):
        chosen = [r for r in rows if (r.norm, r.affine) == (norm, affine) and images in (None, r.images)]
        count = f" ({len(chosen)} of {seeds} seeds)" * (0 < len(chosen) < seeds)
        return mean_with_interval([getattr(row, head) for row in chosen]) + count

    of_heads = [(affine, head) for head in ("old_head", "new_head") for affine in AFFINES]
    seeds = len({row.seed for row in rows})
    over = f", ± the 95 % interval of the mean over {seeds} seeds" if seeds > 1 else ", with one seed"
    counts = sorted({row.images for row in rows if row.affine == "calibrated"})
    first = [[n, *(cell(n, a, head, IMAGES if a == "calibrated" else None) for a, head in of_heads)] for n in norms]
    open_cells = " A dash is not measured." * any("-" in line for line in first)
    parts = [
        markdown(first, ["norm", *(f"{affine}, {head.replace('_', ' ')}" for affine, head in of_heads)]),
        f"Test images of Caltech-101 that are labelled rightly, in %{over}. "
        f"With batch norm {cell(BATCH_NORM, 'trained')}.{open_cells}",
    ]
    if len(counts) > 1:
        lines = [[norm, *(cell(norm, "calibrated", images=count) for count in counts)] for norm in norms]
        parts.append(markdown(lines, ["calibrated, old head", *(f"{count} images" for count in counts)]))
    return "\n\n".join(parts)


def plot(rows: list[RetentionRow], path: str) -> None:
    """Draw the mean over seeds and its interval for each norm, in a panel for the old head and one for a new head."""
    norms = [norm for norm in dict.fromkeys(row.norm for row in rows) if norm != BATCH_NORM]
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, head in zip(figure.subplots(1, 2, sharey=True), ("old_head", "new_head")):
        for affine, color in zip(AFFINES, ("0.7", "C1", "C0")):
            count = IMAGES * (affine == "calibrated")
            runs = [
                [getattr(r, head) for r in rows if (r.norm, r.affine, r.images) == (n, affine, count)] for n in norms
            ]
            means = [np.mean(values) if values else np.nan for values in runs]
            halves = [(half_interval(values) or 0) if values else 0 for values in runs]
            axes.errorbar(norms, means, halves, fmt="o:", color=color, label=affine, capsize=3)
        axes.axhline(np.mean([row.old_head for row in rows if row.norm == BATCH_NORM]), color="k", label="batch norm")
        axes.set_title(head.replace("_", " "), fontsize=10)
        axes.grid(color="0.9")
    figure.axes[0].set_ylabel("Caltech-101, % right")
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, path, dpi=100)


def add_arguments(parser) -> None:
    add_outputs(parser, json="write a row for each network", plot="draw the accuracies of each norm")
    add_data(parser)
    add_norms(parser, "GN1", "GN/64", "GN/32", "GN/16", "PGN", "GN/1")
    parser.add_argument(
        "--images",
        type=count,
        nargs="*",
        default=[],
        metavar="N",
        help=f"also calibrate on N images and test the old head, for each N; default: {IMAGES} images alone",
    )


def main(args) -> None:
    prepare_outputs(args.json, args.plot)
    rows = rows_to_keep(args, RetentionRow, same=["image_size"])
    for seed in args.seeds:
        done = {(row.norm, row.affine, row.images, row.seed) for row in rows}
        for row in _measure(args, seed, done):
            rows.append(row)
            write_rows(args.json, rows)
    if args.plot:
        plot(rows, args.plot)
    print(table(rows))
