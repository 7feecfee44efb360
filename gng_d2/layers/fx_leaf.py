"""Modules of ours under torch.fx."""

from torch import nn
from torch.fx import Proxy

__all__ = ["call_as_leaf"]


def call_as_leaf(module: nn.Module, input: Proxy) -> Proxy:
    """What a ``torch.fx`` tracer records for ``module`` if it stays whole: one node that calls it.

    Tracers keep the modules of ``torch.nn`` whole and walk through all others, so ``module`` asks for it itself.
    """
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), (input,), {})
