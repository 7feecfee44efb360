"""Forward and backward gain of an activation function (Section 2.3 and Table 2 of the paper).

Paper: Kim et al., "On the Ideal Number of Groups for Isometric Gradient Propagation".
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# the activations of Table 2
ACTIVATIONS = {
    "relu": F.relu,
    "prelu": lambda x: F.leaky_relu(x, 0.25),
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
}

_NODES = 2**17
_DEVIATIONS = 12.0  # the integral covers this many on either side; less than 1e-32 lies outside


def activation_gains(activation: str | Callable[[Tensor], Tensor], sigma: float = 1.0) -> tuple[float, float]:
    """F = E[f(X)^2] / Var[X] and B = E[f'(X)^2] for X from N(0, sigma^2) (Definition 2, with E[Y] = 0).

    The midpoint rule integrates in float64, and autograd gives f'. F/B is the ``gain_ratio`` of
    :func:`~gng_d2.practical_num_groups` and :class:`~gng_d2.PracticalGroupNorm`.

    Args:
        activation: one of the names in ``ACTIVATIONS``, or a differentiable callable that works
            elementwise on a tensor.
        sigma: standard deviation of the input.

    Raises:
        ValueError: the name is unknown, or sigma is not positive and finite.

    Examples::
        >>> forward, backward = activation_gains("relu")  # both are 1/2, up to rounding
        >>> forward, backward = activation_gains(torch.nn.Tanh())
    """
    if isinstance(activation, str):
        if activation.lower() not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}, or give a callable")
        activation = ACTIVATIONS[activation.lower()]
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma!r}")
    with torch.inference_mode(False), torch.enable_grad():
        return _integrate(activation, sigma)


def _integrate(activation, sigma):
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).double()  # its parameters
    # cells that meet at 0, where activations have their kinks
    z = (torch.arange(_NODES, dtype=torch.float64) + 0.5) * (2 * _DEVIATIONS / _NODES) - _DEVIATIONS
    probability = torch.exp(-(z**2) / 2)
    probability /= probability.sum()
    x = (sigma * z).requires_grad_()
    y = activation(x.clone())  # which it may write to
    (slope,) = torch.autograd.grad(y.sum(), x)
    forward = (probability * y.detach() ** 2).sum() / sigma**2
    backward = (probability * slope**2).sum()
    return float(forward), float(backward)
