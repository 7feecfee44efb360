"""The path of a module in its model, for messages. It takes a search of all live objects, which is slow."""

import gc
import sys
from functools import cache

import torch
from torch import nn


def module_path(module: nn.Module) -> str:
    """The dotted name of ``module`` in the outermost live module that holds it; its class name if none holds it."""
    if "torch._dynamo" in sys.modules:  # otherwise torch.compile would trace the search
        return torch._dynamo.disable(_module_path)(module)
    return _module_path(module)


def _module_path(module):
    parents = {}
    for parent in live_modules():
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
