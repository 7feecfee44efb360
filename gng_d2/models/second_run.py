"""Let a block find in its second run what it found in its first, and compare what the two runs return."""

import math
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_flatten

_CONTAINERS = list, dict, OrderedDict, defaultdict, Counter
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class State:
    """What a run of ``module`` may read and change now, other than the values in tensors.

    These are the attributes, parameters and buffers of ``module`` and its children, the entries of lists and dicts
    among them, and the states of Python's and NumPy's random number generators.
    """

    def __init__(self, module: nn.Module):
        self._containers = [(container, copy(container)) for container in _containers(module)]
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def tensors(self) -> list[Tensor]:
        """The tensors among the attributes and in the lists and dicts. Their values are not kept."""
        found = (before.values() if isinstance(before, dict) else before for _, before in self._containers)
        return [value for values in found for value in values if isinstance(value, Tensor)]

    def restore(self) -> None:
        for container, before in self._containers:
            if isinstance(container, list):
                container[:] = before
                continue
            if container.keys() != before.keys():
                container.clear()
            for key, value in before.items():  # the update of a Counter would add
                container[key] = value
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _containers(module):
    found, values, seen = [], [], set()
    for m in module.modules():
        found += vars(m), m._parameters, m._buffers  # torch.func.functional_call replaces parameters
        values += [value for name, value in vars(m).items() if name not in _OF_EVERY_MODULE]
    while values:
        value = values.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            found.append(value)
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            values += value
    return found


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Numbers that are others once a tensor was changed in place.

    A tensor made in inference mode has none, and a write to ``tensor.data`` does not change it.
    """
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def sums_of(output: Any) -> list[tuple[float, float, float]]:
    """For each tensor: its sum, the sum of its squares, and the relative difference that another run may have."""
    sums = []
    for tensor in tree_flatten(output)[0]:
        if type(tensor) is Tensor and tensor.is_floating_point() and not tensor.is_meta:
            with _python_dispatch._disable_current_modes(), torch.no_grad():
                tensor = torch.atleast_1d(tensor)
                pieces = tensor.chunk(32, min(tensor.dim() - 1, 1))  # in float64 a whole one takes twice its memory
                total, squares = (sum((piece.double() ** power).sum().item() for piece in pieces) for power in (1, 2))
            is_half = tensor.dtype.itemsize == 2 or torch.is_autocast_enabled(tensor.device.type)
            sums.append((total, squares, 3e-2 if is_half else 1e-3))
    return sums


def differ(before: list[tuple[float, float, float]], after: list[tuple[float, float, float]]) -> bool:
    """Whether the sums of two runs differ by more than rounding explains.

    A sum may be nearly zero although the values are not, so its difference is compared with the root of the sum of
    squares. Rounding changes a sum by a small part of this root, and another dropout mask by about the whole of it.
    """
    return len(before) != len(after) or any(
        abs(total - t) > max(part, 1e-2) * math.sqrt(squares) or abs(squares - s) > part * squares
        for (total, squares, part), (t, s, _) in zip(before, after)
    )
