"""The ideal and the practical number of groups of a group normalization layer.

Paper: Kim et al., "On the Ideal Number of Groups for Isometric Gradient Propagation". All functions
are for one unit block: a weight layer from ``n_in`` to ``n_out`` features, group norm, activation.
For a convolution, also a grouped one, these are all of its ``in_channels`` and ``out_channels``.
"""

from fractions import Fraction
from math import isfinite, isqrt
from numbers import Integral, Rational, Real

from .errors import InputError


def ideal_num_groups(n_in: int, n_out: int, gain_ratio: float = 1.0) -> float:
    """Number of groups for which the unit block's gradients keep their variance (Eq. 32).

    The result is not bounded and need not divide ``n_out``. It is zero or negative where no number of
    groups can make the block isometric.

    Args:
        n_in, n_out: input and output features of the weight layer.
        gain_ratio: F/B, the forward over the backward gain of the activation (Section 2.3). 1 for
            ReLU and its relatives.

    Raises:
        TypeError: a size is not an integer, or the gain ratio is not a real number.
        InputError: a size or the gain ratio is not positive.

    Examples::
        >>> ideal_num_groups(784, 512)
        68.0
    """
    return float(_ideal(n_in, n_out, gain_ratio))


def practical_num_groups(n_in: int, n_out: int, gain_ratio: float = 1.0) -> int:
    """The divisor of ``n_out`` nearest to the ideal number of groups in log2 (Algorithm 1).

    The result is exact for integers of any size. Arguments and errors are those of :func:`ideal_num_groups`.

    Examples::
        >>> practical_num_groups(784, 512)
        64
        >>> practical_num_groups(128, 128)
        1
    """
    ideal = _ideal(n_in, n_out, gain_ratio)
    return nearest_divisor(int(n_out), max(ideal, 1))


def nearest_divisor(n: int, x: Rational) -> int:
    """The divisor of ``n`` nearest to ``x`` > 0 in log2, exact for numbers of any size.

    There is never a tie: if two divisors were equally near, their product would be ``x**2``, and then ``x`` itself
    would be a divisor between them.

    Examples::
        >>> nearest_divisor(256, 12), nearest_divisor(24, 16), nearest_divisor(8, 16)
        (16, 12, 8)
    """
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    divisors = small + [n // d for d in small]
    return min(divisors, key=lambda d: max(Fraction(d, x), Fraction(x, d)))  # |log2(d / x)|, without rounding


def isometry_ratio(n_in: int, n_out: int, num_groups: float, gain_ratio: float = 1.0) -> float:
    """K: the gradient's variance at the block's input, divided by its variance at the output (Eq. 31).

    It is divided by ``gain_ratio``, so that it is 1 at the ideal number of groups for any activation.
    ``num_groups`` may be any positive real number; the other arguments and the errors are those of
    :func:`ideal_num_groups`.

    Examples::
        >>> isometry_ratio(128, 128, 32)
        2.0
    """
    n_in, n_out = checked_size("n_in", n_in), checked_size("n_out", n_out)
    num_groups, gain_ratio = _positive("num_groups", num_groups), _positive("gain_ratio", gain_ratio)
    return float((n_out + 4 * num_groups) / (n_in * gain_ratio))


# the number of groups of each norm that the paper compares; None where it does not divide n_out
GROUP_CHOICES = {
    "GN": lambda n_in, n_out: 32 if n_out % 32 == 0 else None,
    "GN1": lambda n_in, n_out: 1,
    "PGN": practical_num_groups,
}


def _ideal(n_in, n_out, gain_ratio):
    n_in, n_out = checked_size("n_in", n_in), checked_size("n_out", n_out)
    return (_positive("gain_ratio", gain_ratio) * n_in - n_out) / 4


def checked_size(name: str, value: int) -> int:
    """``value``, the argument ``name``, as an int.

    Raises:
        TypeError: it is not an integer.
        InputError: it is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a positive integer, not {value!r}")
    if value < 1:
        raise InputError(f"{name} must be a positive integer, not {value!r}")
    return int(value)


def _positive(name, value):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a positive number, not {value!r}")
    if not isfinite(value) or value <= 0:
        raise InputError(f"{name} must be a positive finite number, not {value!r}")
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    return Fraction(float(value))
