"""The path of a module in its model, for messages. It takes a search of all live objects, which is slow."""

import gc
import sys
from functools import cache

import torch
from torch import nn

__all__ = ["live_modules", "module_path"]


def module_path(module: nn.Module, modules: list[nn.Module] | None = None) -> str:
    """The dotted name of ``module`` in the outermost of ``modules`` that holds it; its class name if none holds it.

    Args:
        modules: where to search; by default, all live modules.
    """
    if "torch._dynamo" in sys.modules:  # otherwise torch.compile would trace the search
        return torch._dynamo.disable(_module_path)(module, modules)
    return _module_path(module, modules)


def _module_path(module, modules):
    parents = {}
    for parent in live_modules() if modules is None else modules:
        for name, child in parent.__dict__.get("_modules", {}).items():
            parents.setdefault(id(child), (parent, name))
    outermost, names, seen = module, [], set()
    while id(outermost) in parents and id(outermost) not in seen:
        seen.add(id(outermost))
        outermost, name = parents[id(outermost)]
        names.insert(0, name)
    return ".".join(names) or type(module).__name__


def live_modules() -> list[nn.Module]:
    is_module = cache(lambda kind: issubclass(kind, nn.Module))
    return [thing for thing in gc.get_objects() if is_module(type(thing))]  # type: ignore[arg-type]
