"""A module's class replaced by one that runs it otherwise, while its parameters, children, hooks and state stay.

A module has one original class and a set of ways in which it runs otherwise: with a standardized weight, with its
norms fused, with its norms computed again. Ways come and go in any order, and the class that they make of the original
one is always the same: of two ways, the one of the higher ``order`` wraps the other.
"""

from functools import cache, wraps
from types import FunctionType

from torch import nn

__all__ = ["StandIn", "add", "has", "original_class", "remove", "ways_of"]


class StandIn:
    """The mixin of ways that replace one method of the class that they wrap.

    A way has an ``order``, and makes a class with ``wrap``, whose last base is the class that it wraps. Modules of such
    a class copy and pickle as those of the class that it wraps, whose name its own ends in.
    """

    order: int

    @classmethod
    def method_of(cls, wrapped: type) -> str:
        """The name of the method of ``wrapped`` that runs in another way."""
        raise NotImplementedError

    def run(self, method, args, kwargs):
        """Run ``method``, that of the wrapped class, in this way."""
        raise NotImplementedError

    @classmethod
    @cache
    def wrap(cls, wrapped: type) -> type:
        """The class that runs what ``wrapped`` runs, in this way."""
        name = cls.method_of(wrapped)
        original = getattr(wrapped, name)

        def run(self, *args, **kwargs):
            return cls.run(self, getattr(super(made, self), name), args, kwargs)

        # torch.fx reads the signature of the original method, torch.jit.script its code, with the names in its module
        method = wraps(original)(FunctionType(run.__code__, original.__globals__, closure=run.__closure__))
        names = {"__module__": wrapped.__module__, "__doc__": wrapped.__doc__, name: method, "_way_of_running": cls}
        made = type(f"{cls.__name__.lstrip('_')}{wrapped.__name__}", (cls, wrapped), names)
        return made

    @staticmethod
    def unwrap(module: nn.Module, made: type) -> type:
        """The class that ``made``, the class of ``module`` without the ways around this one, wraps."""
        return made.__bases__[-1]

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(2)
        return _new, (original_class(self), *ways_of(self)), *state


def add(module: nn.Module, way: type) -> None:
    """Have ``module`` run in that way, too."""
    module.__class__ = _class_of(original_class(module), {*ways_of(module), way})


def remove(module: nn.Module, way: type) -> None:
    """Have ``module`` no longer run in that way."""
    module.__class__ = _class_of(original_class(module), {*ways_of(module)} - {way})


def has(module: nn.Module, way: type) -> bool:
    """Whether ``module`` runs in that way."""
    return way in ways_of(module)


def original_class(module: nn.Module) -> type:
    """The class of ``module`` without any way."""
    ways = ways_of(module)
    if not ways:
        return type(module)
    *_, (innermost, made) = ways.items()
    return innermost.unwrap(module, made)


def ways_of(module: nn.Module) -> dict[type, type]:
    """The ways of ``module`` from the outermost on, each with the class that it made."""
    ways, cls = {}, type(module)
    while way := vars(cls).get("_way_of_running"):
        ways[way] = cls
        cls = cls.__bases__[-1]
    return ways


def _class_of(cls, ways):
    for way in sorted(ways, key=lambda way: way.order):
        cls = way.wrap(cls)
    return cls


def _new(cls, *ways):
    cls = _class_of(cls, ways)
    return cls.__new__(cls)
