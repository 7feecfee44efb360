"""Where the paper's Eqs. 22 and 31 hold: what a block does to the gradient, over the size of its groups.

B (Eq. 22) is the factor by which the norm changes the variance of the gradient, and D (K, Eq. 31) that of the whole
block. They are measured for a fully connected layer and for 3x3 convolutions on maps of three sizes. The groups of the
fully connected layer have 4 features or more, because the expected values of smaller groups are infinite. For 4
features they are finite but their variance is not, so the median of the repeats stands in place of the mean.
"""

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from command_line import add_outputs
from gng_d2.job.files import prepare_outputs, save_figure

from .rows import machine, markdown, write_rows
from .unit_block import (
    UnitBlock,
    add_experiments,
    estimate,
    exact_ratios,
    has_finite_variance,
    measure_ratios,
    paper_ratios,
    standard_error,
)

# layer -> kernel size, number of inputs in an experiment, map sizes, features in the smallest group
LAYERS = {"linear": (1, 512, (1,), 4), "conv3x3": (3, 8, (4, 8, 16), 1)}


@dataclass(frozen=True)
class SweepRow:
    """One equation for one size of the groups."""

    layer: str  # one of LAYERS
    n_in: int
    n_out: int
    num_groups: int
    map_size: int  # height and width
    group_size: int  # features in a group
    equation: str  # "B" or "D"
    paper: float
    exact: float | None  # None where no formula is known
    empirical: float
    standard_error: float | None  # None if the variance is not finite
    machine: str


def measure(experiments: int, seed: int = 0, n_in: int = 256, n_out: int = 128) -> list[SweepRow]:
    """B and D over the group sizes, for the layers and map sizes in ``LAYERS``.

    Raises:
        InputError: there are fewer experiments than repeats.
    """
    blocks = [
        (layer, inputs, UnitBlock(n_in, n_out, n_out // group_size, kernel_size, map_size))
        for layer, (kernel_size, inputs, map_sizes, smallest) in LAYERS.items()
        for map_size in map_sizes
        for group_size in (2**power for power in range(n_out.bit_length()))
        if group_size >= smallest
    ]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with tqdm(total=experiments * len(blocks), unit="experiment") as bar:
        for layer, inputs, block in blocks:
            ratios = measure_ratios(block, experiments, inputs, generator, bar.update)
            rows += [_row(layer, block, equation, ratios[equation]) for equation in "BD"]
    return rows


def _row(layer, block, equation, ratios):
    finite = has_finite_variance(block, equation)
    return SweepRow(
        layer=layer,
        n_in=block.n_in,
        n_out=block.n_out,
        num_groups=block.num_groups,
        map_size=block.map_size,
        group_size=block.group_size,
        equation=equation,
        paper=paper_ratios(block)[equation],
        exact=exact_ratios(block)[equation],
        empirical=estimate(ratios, finite)[0],
        standard_error=standard_error(ratios) if finite else None,
        machine=machine(),
    )


def table(rows: list[SweepRow]) -> str:
    """A table of B alone, because D follows from B and the other equations."""
    lines = []
    for row in rows:
        if row.equation == "B":
            error = f" ± {row.standard_error:.3f}" if row.standard_error is not None else ""
            layer = f"{row.layer}, {row.map_size}x{row.map_size}"
            measured = f"{row.empirical:.3f}{error}"
            lines.append([layer, row.group_size, row.num_groups, row.paper, row.exact, measured])
    return markdown(lines, ["layer, map", "n_g", "G", "paper, Eq. 22", "exact", "measured"])


def plot(rows: list[SweepRow], path: str) -> None:
    """Draw both equations over the group size, a panel for each layer."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    titles = {"B": "B: over the norm (Eq. 22)", "D": "D: over the block (K, Eq. 31)"}
    figure = Figure(figsize=(5 * len(layers), 7.5), layout="constrained")
    panels = figure.subplots(2, len(layers))
    for equation, line in zip("BD", panels):
        for layer, axes in zip(layers, line):
            shown = [row for row in rows if row.equation == equation and row.layer == layer]
            maps = sorted({row.map_size for row in shown})
            _plot_panel(axes, [[row for row in shown if row.map_size == size] for size in maps])
            axes.set_title(f"{layer} {shown[0].n_in} \u2192 {shown[0].n_out}", fontsize=10)
        line[0].set_ylabel(f"gradient ratio {titles[equation]}")
    for axes in panels[-1]:
        axes.set_xlabel("group size, channels")
    save_figure(figure, path, dpi=90)


def _plot_panel(axes, curves):
    axes.set_xscale("log", base=2)
    sizes = [row.group_size for row in curves[0]]
    axes.plot(sizes, [row.paper for row in curves[0]], color="C3", label="paper")
    if curves[0][0].exact is not None:
        axes.plot(sizes, [row.exact for row in curves[0]], "k", label="exact")
    for rows, color in zip(curves, ("C0", "C2", "C1", "C4")):
        size = rows[0].map_size
        axes.errorbar(
            sizes,
            [row.empirical for row in rows],
            [1.96 * (row.standard_error or 0) for row in rows],
            fmt="o:",
            color=color,
            ms=5,
            mfc="none",
            lw=0.8,
            label="measured" + f", {size}x{size} maps" * (size > 1),
        )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="0.9")
    axes.legend(fontsize=8)


def add_arguments(parser) -> None:
    add_outputs(
        parser,
        json="write a row for each layer, map size, group size and equation",
        plot="draw the paper's, the exact and the measured value over the group size",
    )
    add_experiments(parser, default=100)


def main(args) -> None:
    prepare_outputs(args.json, args.plot)
    rows = measure(args.experiments, args.seed)
    write_rows(args.json, rows)
    if args.plot:
        plot(rows, args.plot)
    print(table(rows))
