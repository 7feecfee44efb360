"""Table 2 of the paper computed again: forward and backward gains of eleven activations.

Our gains are computed by quadrature, the paper's from 10^7 samples.
"""

from dataclasses import dataclass

from command_line import add_outputs
from gng_d2.gains import activation_gains
from gng_d2.job.files import prepare_outputs

from .paper import TABLE_2
from .rows import machine, markdown, write_rows


@dataclass(frozen=True)
class Table2Row:
    """The gains of one activation for inputs with one standard deviation."""

    activation: str
    sigma: float
    forward_gain: float
    backward_gain: float
    paper_forward_gain: float
    paper_backward_gain: float
    machine: str


def measure() -> list[Table2Row]:
    """The gains of the paper's activations, at the paper's standard deviations."""
    return [
        Table2Row(activation, sigma, *activation_gains(activation, sigma), *paper, machine())
        for sigma, activations in TABLE_2.items()
        for activation, paper in activations.items()
    ]


def table(rows: list[Table2Row]) -> str:
    lines = [
        [
            row.activation,
            f"{row.sigma:g}",
            row.forward_gain,
            row.paper_forward_gain,
            row.backward_gain,
            row.paper_backward_gain,
        ]
        for row in rows
    ]
    return markdown(lines, ["activation", "sigma", "F", "F in the paper", "B", "B in the paper"])


def add_arguments(parser) -> None:
    add_outputs(parser, json="write a row for each activation and standard deviation")


def main(args) -> None:
    prepare_outputs(args.json)
    rows = measure()
    write_rows(args.json, rows)
    print(table(rows))
