"""Tables 1 and 2 of the paper measured again, and its Eqs. 22 and 31 over the size of a group, as rows.

Paper: Kim et al., "On the Ideal Number of Groups for Isometric Gradient Propagation".
"""

from typing import Dict, List

import torch
from tqdm import tqdm

from gng_d2.gains import activation_gains

from .paper import TABLE_1, TABLE_2
from .unit_block import (
    UnitBlock,
    estimate,
    exact_ratios,
    has_finite_variance,
    measure_ratios,
    paper_ratios,
    standard_error,
)

__all__ = ["SWEEP", "sweep", "table_1", "table_2"]

# layer -> kernel size, inputs of an experiment, map sizes, smallest group
SWEEP = {"linear": (1, 512, (1,), 4), "conv3x3": (3, 8, (4, 8, 16), 1)}


def table_1(experiments: int, seed: int = 0) -> List[Dict]:
    """Equations A to D for the paper's four blocks.

    Keys: ``n_in``, ``n_out``, ``num_groups``, ``equation``, ``paper_empirical``, ``empirical`` with ``low`` and
    ``high`` (:func:`~study.unit_block.estimate`: B and D have no finite variance here), ``theoretical`` (the paper's),
    ``exact`` (:func:`~study.unit_block.exact_ratios`).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with tqdm(total=experiments * len(TABLE_1), unit="experiment") as bar:
        for shape, paper in TABLE_1.items():
            block = UnitBlock(*shape)
            ratios = measure_ratios(block, experiments, generator=generator, progress=bar.update)
            for equation, theoretical in paper_ratios(block).items():
                empirical, low, high = estimate(ratios[equation], has_finite_variance(block, equation))
                rows.append(
                    {
                        **dict(zip(("n_in", "n_out", "num_groups"), shape)),
                        "equation": equation,
                        "paper_empirical": paper[equation],
                        "empirical": empirical,
                        "low": low,
                        "high": high,
                        "theoretical": theoretical,
                        "exact": exact_ratios(block)[equation],
                    }
                )
    return rows


def table_2() -> List[Dict]:
    """Gains of the paper's eleven activations by quadrature, beside the paper's from 10^7 samples.

    Keys: ``activation``, ``sigma``, ``forward_gain``, ``backward_gain``, ``paper_forward_gain``,
    ``paper_backward_gain``.
    """
    rows = []
    for sigma, activations in TABLE_2.items():
        for activation, (paper_forward, paper_backward) in activations.items():
            forward, backward = activation_gains(activation, sigma)
            rows.append(
                {
                    "activation": activation,
                    "sigma": sigma,
                    "forward_gain": forward,
                    "backward_gain": backward,
                    "paper_forward_gain": paper_forward,
                    "paper_backward_gain": paper_backward,
                }
            )
    return rows


def sweep(experiments: int, seed: int = 0, n_in: int = 256, n_out: int = 128) -> List[Dict]:
    """Equations B (Eq. 22) and D (K, Eq. 31) over group sizes, for the layers and map sizes of ``SWEEP``.

    Fully connected groups start at 4: the expected values of smaller ones have no bound.

    Keys: ``layer``, ``n_in``, ``n_out``, ``num_groups``, ``map_size``, ``group_size``, ``equation``, ``paper``,
    ``exact`` (None where no formula is known), ``empirical``, ``standard_error`` (None where the variance is
    not finite, and ``empirical`` is a median of means: fully connected groups of 4).
    """
    blocks = [
        (layer, inputs, UnitBlock(n_in, n_out, n_out // group_size, kernel_size, map_size))
        for layer, (kernel_size, inputs, map_sizes, smallest) in SWEEP.items()
        for map_size in map_sizes
        for group_size in (2**power for power in range(n_out.bit_length()))
        if group_size >= smallest
    ]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with tqdm(total=experiments * len(blocks), unit="experiment") as bar:
        for layer, inputs, block in blocks:
            ratios = measure_ratios(block, experiments, inputs, generator, bar.update)
            for equation in "BD":
                finite = has_finite_variance(block, equation)
                rows.append(
                    {
                        "layer": layer,
                        "n_in": n_in,
                        "n_out": n_out,
                        "num_groups": block.num_groups,
                        "map_size": block.map_size,
                        "group_size": block.group_size,
                        "equation": equation,
                        "paper": paper_ratios(block)[equation],
                        "exact": exact_ratios(block)[equation],
                        "empirical": estimate(ratios[equation], finite)[0],
                        "standard_error": standard_error(ratios[equation]) if finite else None,
                    }
                )
    return rows
