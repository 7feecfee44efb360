"""Replace a module's class by one that runs it in another way, and keep its parameters, children, hooks and state.

A module has one original class and a set of ways of running: with a standardized weight, with its norms fused, with its
norms recomputed. Ways can be added and removed in any order. The same ways always make the same class of the original
one, because a way with a higher ``order`` wraps a way with a lower one.
"""

from functools import cache, wraps
from types import FunctionType

from torch import nn

from gng_d2.errors import InputError

from .module_path import module_path


class StandIn:
    """The mixin of ways that replace one method of the class that they wrap.

    A way has an ``order``, a classmethod ``method_of(wrapped)``, which names the method of ``wrapped`` that runs in
    another way, and ``run(method, args, kwargs)``, which runs that method in this way. Its ``wrap`` makes a class whose
    last base is the wrapped class and whose name ends in the name of the wrapped class. Modules of the new class can be
    copied and pickled as before.
    """

    order: int

    @classmethod
    @cache
    def wrap(cls, wrapped: type) -> type:
        """The class that does what ``wrapped`` does, in this way."""
        name = cls.method_of(wrapped)
        original = getattr(wrapped, name)

        def run(self, *args, **kwargs):
            return cls.run(self, getattr(super(made, self), name), args, kwargs)

        # torch.fx reads the signature of the original method; torch.jit.script reads its code and its module's names
        method = wraps(original)(FunctionType(run.__code__, original.__globals__, closure=run.__closure__))
        names = {"__module__": wrapped.__module__, "__doc__": wrapped.__doc__, name: method, "_way_of_running": cls}
        made = type(f"{cls.__name__.lstrip('_')}{wrapped.__name__}", (cls, wrapped), names)
        return made

    @staticmethod
    def unwrap(module: nn.Module, made: type) -> type:
        """The class that ``made`` wraps. ``made`` is the class of ``module`` without the ways outside this one."""
        return made.__bases__[-1]

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(2)
        return _new, (original_class(self), *ways_of(self)), *state


def add(module: nn.Module, way: type) -> None:
    """Have ``module`` run in ``way`` too.

    Raises:
        InputError: as :func:`check_changeable`.
    """
    check_changeable(module)
    module.__class__ = _class_of(original_class(module), {*ways_of(module), way})


def remove(module: nn.Module, way: type) -> None:
    """Have ``module`` no longer run in ``way``.

    Raises:
        InputError: as :func:`check_changeable`.
    """
    check_changeable(module)
    module.__class__ = _class_of(original_class(module), {*ways_of(module)} - {way})


def remove_everywhere(model: nn.Module, way: type) -> list[nn.Module]:
    """Have no module of ``model`` run in ``way``, or raise an InputError and change nothing. Returns those that did."""
    modules = [module for module in model.modules() if has(module, way)]
    for module in modules:
        check_changeable(module)
    for module in modules:
        remove(module, way)
    return modules


def is_changeable(module: nn.Module) -> bool:
    """Whether ways can be added and removed: PyTorch has put no subclass on top of those that ``module`` has."""
    ways = ways_of(module)
    return not ways or type(module) in ways.values()


def check_changeable(module: nn.Module) -> None:
    """Raise an InputError if ``module`` is not :func:`is_changeable`."""
    if not is_changeable(module):
        raise InputError(
            f"{module_path(module)}: how it runs cannot be changed, because its class is {type(module).__name__} now. "
            f"Remove its parametrizations, or make the change before torch.nn.utils.parametrize or fully_shard"
        )


def has(module: nn.Module, way: type) -> bool:
    """Whether ``module`` runs in ``way``."""
    return way in ways_of(module)


def original_class(module: nn.Module) -> type:
    """The class of ``module`` without any way."""
    ways = ways_of(module)
    if not ways:
        return type(module)
    *_, (innermost, made) = ways.items()
    return innermost.unwrap(module, made)


def ways_of(module: nn.Module) -> dict[type, type]:
    """The ways of ``module`` from the outermost on, each with the class that it made.

    A subclass that PyTorch has put on top of them (parametrize, fully_shard) runs in these ways too. One of the user's
    may run in another.
    """
    ways, cls = {}, type(module)
    while cls.__module__.startswith("torch.") and not {"_way_of_running", "forward"} & vars(cls).keys():
        cls = cls.__bases__[-1]
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
