"""Measured gradient ratios of a unit block: weight layer, group norm, ReLU (Equations A to D of the paper).

Paper: Kim et al., "On the Ideal Number of Groups for Isometric Gradient Propagation", Section 2.2. As
there, two unit blocks with weights of unit variance take data from the standard normal distribution, and
the ratios are those of the second block:

    A   Var[dL/dx] / Var[dL/dy]           over the weight layer
    B   Var[y] Var[dL/dy] / Var[dL/dz]    over the group norm
    C   Var[dL/dz] / Var[dL/dx']          over ReLU
    D   Var[dL/dx] / Var[dL/dx']          over the block

with x the input, y the output of the weight layer, z that of the norm, x' that of ReLU. The paper calls L
an aggregation of the features x'. A plain sum has a gradient of no variance; L is a sum with independent
standard normal weights, which gives the paper's figures.

A variance here is that of the whole population: all features, inputs, weights and loss weights. All five
quantities have mean 0 in it, so it is a mean of squares. The paper takes each sample's variance over its
features, about the sample's own mean: that lowers A to n_out (1 - (2 - 1/pi) / n_in), which is what its
Table 1 shows, 511.16 for 1024 -> 512.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gng_d2.errors import InputError
from gng_d2.groups import isometry_ratio

__all__ = [
    "REPEATS",
    "UnitBlock",
    "add_experiments",
    "estimate",
    "exact_ratios",
    "has_finite_variance",
    "measure_ratios",
    "paper_ratios",
    "standard_error",
]

REPEATS = 20


class UnitBlock(NamedTuple):
    """The shape of a unit block. A fully connected layer is a 1x1 convolution on a map of 1x1.

    Args:
        n_in, n_out: features of the weight layer. The block before it is from n_in to n_in features.
        num_groups: of the norms of both blocks, a divisor of both sizes.
        kernel_size: odd; the convolution pads with zeros, so that maps keep their size.
        map_size: height and width of the maps.
    """

    n_in: int
    n_out: int
    num_groups: int
    kernel_size: int = 1
    map_size: int = 1

    @property
    def group_size(self) -> int:
        """n_g: features in a group."""
        return self.n_out // self.num_groups


def paper_ratios(block: UnitBlock) -> dict[str, float]:
    """The right-hand sides of Eqs. A to D in the paper, for weights of unit variance."""
    return {
        "A": float(block.n_out * block.kernel_size**2),
        "B": 1 + 4 / block.group_size,
        "C": 0.5,
        "D": isometry_ratio(block.n_in, block.n_out, block.num_groups),
    }


def exact_ratios(block: UnitBlock) -> dict[str, float | None]:
    """What A to D are for a fully connected block, where y is Gaussian for given inputs.

    - The norm's backward removes from a group's gradient the direction of the ones and that of z, which
      leaves (n_g - 2) / n_g of it; and 1 / (the group's variance) is n_g / (n_g - 3) on average. So B is
      (n_g - 2) / (n_g - 3), and without bound for n_g of 3 or less: None.
    - The norm does not see the scale of x, so dL/dx has no part along x: A is n_out (1 - 1/n_in), not n_out.
    - C is 1/2, and D the product of the three over Var[y] = n_in / 2.

    None for all of a convolution: its groups span positions too, and what passes depends on how far the
    channels' means and variances differ, for which there is no formula here.
    """
    if block.map_size > 1:
        return dict.fromkeys("ABCD")
    n_in, n_out, group_size = block.n_in, block.n_out, block.group_size
    norm = (group_size - 2) / (group_size - 3) if group_size > 3 else None
    weight = n_out * (1 - 1 / n_in)
    return {"A": weight, "B": norm, "C": 0.5, "D": None if norm is None else weight * norm / n_in}


def has_finite_variance(block: UnitBlock, equation: str) -> bool:
    """Whether a standard error means something: 1 / (variance of n_g Gaussians) has a variance for n_g > 5."""
    return equation in "AC" or block.map_size > 1 or block.group_size > 5


def measure_ratios(
    block: UnitBlock,
    experiments: int,
    inputs: int = 64,
    generator: torch.Generator | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Measure A to D in each of ``REPEATS`` repeats: float64, shape (REPEATS,), ratios of averages over experiments.

    An experiment draws the weights of both blocks, and ``inputs`` inputs that share them, each with loss
    weights of its own. The repeats share nothing, so their spread is the error of a ratio, for any
    dependence within an experiment.

    Args:
        experiments: at least ``REPEATS``; split evenly among the repeats.
        progress: called after each experiment.

    Raises:
        InputError: there are fewer experiments than repeats.
    """
    if experiments < REPEATS:
        raise InputError(f"--experiments {experiments}: at least {REPEATS}, one for each repeat")
    moments = []
    for _ in range(experiments):
        moments.append(_mean_squares(block, inputs, generator))
        progress()
    means = torch.stack([repeat.mean(0) for repeat in torch.stack(moments).tensor_split(REPEATS)])
    dx, y, dy, dz, dout = means.unbind(1)
    return {"A": dx / dy, "B": y * dy / dz, "C": dz / dout, "D": dx / dout}


def estimate(ratios: Tensor, finite_variance: bool) -> tuple[float, float, float]:
    """A value with an interval, from the repeats of :func:`measure_ratios`.

    Their mean, and 1.96 standard errors below and above. Where the variance is not finite, the median
    of the repeats (a median of means), and the quantiles between which 90 % of them lie.
    """
    if not finite_variance:
        return tuple(ratios.quantile(torch.tensor([0.5, 0.05, 0.95], dtype=ratios.dtype)).tolist())
    value, error = ratios.mean().item(), standard_error(ratios)
    return value, value - 1.96 * error, value + 1.96 * error


def add_experiments(parser, default: int) -> None:
    """Give ``parser`` the flags ``--experiments`` and ``--seed``."""
    parser.add_argument(
        "--experiments",
        type=int,
        default=default,
        metavar="N",
        help=f"draws of the weights for each block, at least {REPEATS}; default: %(default)s, a few minutes",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def standard_error(ratios: Tensor) -> float:
    return (ratios.std() / len(ratios) ** 0.5).item()


def _mean_squares(block, inputs, generator):
    """Of dL/dx, y, dL/dy, dL/dz, dL/dx', in float64."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def weight_and_norm(x, n_out):
        weight = normal(n_out, block.n_in, block.kernel_size, block.kernel_size)
        y = F.conv2d(x, weight, padding=block.kernel_size // 2)
        return y, F.group_norm(y, block.num_groups)

    data = normal(inputs, block.n_in, block.map_size, block.map_size)
    x = F.relu(weight_and_norm(data, block.n_in)[1])
    # To the expected size. The second norm does not see it, and Var[y] is the same for all inputs, as Eq. 29 has it.
    x *= (0.5 / x.square().mean((1, 2, 3), keepdim=True)).sqrt()
    x.requires_grad_()
    y, z = weight_and_norm(x, block.n_out)
    out = F.relu(z)
    dout = normal(*out.shape)
    dx, dy, dz = torch.autograd.grad(out, (x, y, z), dout)
    return torch.stack([t.detach().square().mean() for t in (dx, y, dy, dz, dout)]).double()
