"""Measured gradient ratios of a unit block: weight layer, group norm, ReLU (Equations A to D of the paper).

Paper: Kim et al., "On the Ideal Number of Groups for Isometric Gradient Propagation", Section 2.2. As there, data from
the standard normal distribution pass two unit blocks with weights of unit variance. The ratios are those of the second
block:

    A   Var[dL/dx] / Var[dL/dy]           over the weight layer
    B   Var[y] Var[dL/dy] / Var[dL/dz]    over the group norm
    C   Var[dL/dz] / Var[dL/dx']          over ReLU
    D   Var[dL/dx] / Var[dL/dx']          over the block

x is the input of the block, y the output of the weight layer, z that of the norm, and x' that of ReLU. The paper calls
the loss L an aggregation of the features x'. The gradient of a plain sum has no variance, so L is a sum with
independent standard normal weights, which reproduces the paper's figures.

A variance is taken over the whole population: all features, inputs, weights and loss weights. Each of the five
quantities has mean 0 over it, so the variance is a mean of squares. The paper takes the variance of each sample over
its features, about the sample's own mean. That lowers A to n_out (1 - (2 - 1/pi) / n_in), which is what its Table 1
shows: 511.16 for 1024 -> 512.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gng_d2.errors import InputError
from gng_d2.groups import isometry_ratio

REPEATS = 20


class UnitBlock(NamedTuple):
    """The shape of a unit block. A fully connected layer is a 1x1 convolution on a map of 1x1.

    Args:
        n_in, n_out: features of the weight layer. The block before this one has n_in input and n_in output features.
        num_groups: the number of groups in the norms of both blocks, a divisor of n_in and n_out.
        kernel_size: an odd number. The convolution pads with zeros, so that maps keep their size.
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
    """The exact values of A to D for a fully connected block, in which y is Gaussian for given inputs.

    - The norm's backward pass removes from the gradient of a group the direction of the ones and that of z, which
      leaves (n_g - 2) / n_g of it, and 1 / (the group's variance) is n_g / (n_g - 3) on average. So B is
      (n_g - 2) / (n_g - 3). It is infinite, given as None, if n_g is 3 or less.
    - The norm does not depend on the scale of x, so dL/dx has no part along x, and A is n_out (1 - 1/n_in), not n_out.
    - C is 1/2, and D is the product of the three over Var[y] = n_in / 2.

    All four are None for a convolution. Its groups span positions too, and what passes depends on how far the means and
    variances of the channels differ, for which there is no formula here.
    """
    if block.map_size > 1:
        return dict.fromkeys("ABCD")
    n_in, n_out, group_size = block.n_in, block.n_out, block.group_size
    norm = (group_size - 2) / (group_size - 3) if group_size > 3 else None
    weight = n_out * (1 - 1 / n_in)
    return {"A": weight, "B": norm, "C": 0.5, "D": None if norm is None else weight * norm / n_in}


def has_finite_variance(block: UnitBlock, equation: str) -> bool:
    """Whether ``equation`` has a standard error: 1 / (variance of n_g Gaussians) has a variance only for n_g > 5."""
    return equation in "AC" or block.map_size > 1 or block.group_size > 5


def measure_ratios(
    block: UnitBlock,
    experiments: int,
    inputs: int = 64,
    generator: torch.Generator | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Measure A to D in each of ``REPEATS`` repeats.

    An experiment draws the weights of both blocks, and ``inputs`` inputs that share them, each with loss weights of its
    own. The repeats share nothing, so their spread shows the error of a ratio, whatever depends on what within an
    experiment.

    Args:
        experiments: at least ``REPEATS``. They are split evenly among the repeats.
        progress: is called after each experiment.

    Returns:
        By equation the ratios of averages over the experiments, in float64, of shape (REPEATS,).

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
    """A value and its interval, (value, low, high), from the repeats of :func:`measure_ratios`.

    It is the mean of the repeats with 1.96 standard errors below and above. If the variance is not finite, it is the
    median of the repeats with the quantiles between which 90 % of them lie.
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
        help=f"draw the weights of each block N times, at least {REPEATS}; default: %(default)s, a few minutes",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def standard_error(ratios: Tensor) -> float:
    return (ratios.std() / len(ratios) ** 0.5).item()


def _mean_squares(block, inputs, generator):
    """The mean squares of dL/dx, y, dL/dy, dL/dz and dL/dx', in float64."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def weight_and_norm(x, n_out):
        weight = normal(n_out, block.n_in, block.kernel_size, block.kernel_size)
        y = F.conv2d(x, weight, padding=block.kernel_size // 2)
        return y, F.group_norm(y, block.num_groups)

    data = normal(inputs, block.n_in, block.map_size, block.map_size)
    x = F.relu(weight_and_norm(data, block.n_in)[1])
    # Scaled to its expected size, so that Var[y] is the same for all inputs, as in Eq. 29. The second norm undoes that.
    x *= (0.5 / x.square().mean((1, 2, 3), keepdim=True)).sqrt()
    x.requires_grad_()
    y, z = weight_and_norm(x, block.n_out)
    out = F.relu(z)
    dout = normal(*out.shape)
    dx, dy, dz = torch.autograd.grad(out, (x, y, z), dout)
    return torch.stack([t.detach().square().mean() for t in (dx, y, dy, dz, dout)]).double()
