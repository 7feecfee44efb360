"""Table 1 of the paper measured again: Equations A to D for its four blocks.

An experiment draws the weights of two blocks, and 64 inputs that share them, each with loss weights of its own. The
variances are of the whole population, and a ratio is a ratio of averages. A and C are given as the mean with an
interval of 1.96 standard errors on either side. B and D have no finite variance where a group has 4 features, so they
are given as the median of 20 repeats, each a ratio of averages, with the 5 % and 95 % quantiles. The paper takes
variances about each sample's own mean, which lowers A to n_out (1 - (2 - 1/pi) / n_in): 511.16, 255.16, 127.16, 63.16.
"""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from command_line import add_outputs
from gng_d2.job.files import prepare_outputs

from .paper import TABLE_1
from .rows import machine, markdown, write_rows
from .unit_block import (
    UnitBlock,
    add_experiments,
    estimate,
    exact_ratios,
    has_finite_variance,
    measure_ratios,
    paper_ratios,
)


@dataclass(frozen=True)
class Table1Row:
    """One equation of one block."""

    n_in: int
    n_out: int
    num_groups: int
    equation: str  # "A" to "D", as in unit_block.py
    paper_empirical: float  # what the paper measured
    empirical: float  # what we measured
    low: float  # its interval
    high: float
    theoretical: float  # by the paper's formula
    exact: float | None  # by unit_block.exact_ratios
    machine: str


def measure(experiments: int, seed: int = 0) -> list[Table1Row]:
    """Each equation of each of the paper's blocks, from ``experiments`` draws of the weights.

    Raises:
        InputError: there are fewer experiments than unit_block.REPEATS.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with tqdm(total=experiments * len(TABLE_1), unit="experiment") as bar:
        for shape, paper in TABLE_1.items():
            block = UnitBlock(*shape)
            ratios = measure_ratios(block, experiments, generator=generator, progress=bar.update)
            for equation, theoretical in paper_ratios(block).items():
                interval = estimate(ratios[equation], has_finite_variance(block, equation))
                exact = exact_ratios(block)[equation]
                rows.append(Table1Row(*shape, equation, paper[equation], *interval, theoretical, exact, machine()))
    return rows


def table(rows: list[Table1Row]) -> str:
    lines = [
        [
            f"{row.n_in} -> {row.n_out}, G = {row.num_groups}",
            row.equation,
            row.paper_empirical,
            f"{row.empirical:.3f} ({row.low:.3f} to {row.high:.3f})",
            row.theoretical,
            row.exact,
        ]
        for row in rows
    ]
    return markdown(lines, ["block", "Eq.", "paper, measured", "ours (interval)", "paper, theory", "exact"])


def add_arguments(parser) -> None:
    add_outputs(parser, json="write a row for each block and equation")
    add_experiments(parser, default=2000)


def main(args) -> None:
    prepare_outputs(args.json)
    rows = measure(args.experiments, args.seed)
    write_rows(args.json, rows)
    print(table(rows))
