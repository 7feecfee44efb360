"""Where a module stands in its model, for messages: found by a search of all live objects, so never in a fast path."""

import gc
from typing import Iterator, Optional

from torch import Tensor, nn

__all__ = ["module_path", "owner_of"]


def module_path(module: nn.Module) -> str:
    """The dotted name of ``module`` below the outermost live module that holds it; its class where none does."""
    parents = {}
    for parent in _modules():
        for name, child in parent.__dict__.get("_modules", {}).items():
            parents.setdefault(id(child), (parent, name))
    outermost, names, seen = module, [], set()
    while id(outermost) in parents and id(outermost) not in seen:
        seen.add(id(outermost))
        outermost, name = parents[id(outermost)]
        names.insert(0, name)
    return ".".join(names) or type(module).__name__


def owner_of(parameter: Tensor) -> Optional[nn.Module]:
    """The live module that has ``parameter``; None where none has."""
    for module in _modules():
        if any(p is parameter for p in module.__dict__.get("_parameters", {}).values()):
            return module
    return None


def _modules() -> Iterator[nn.Module]:
    return (thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module))
