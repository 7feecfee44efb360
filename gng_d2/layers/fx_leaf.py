"""How torch.fx traces our modules."""

from torch import nn
from torch.fx import Proxy


def call_as_leaf(module: nn.Module, input: Proxy) -> Proxy:
    """Have a ``torch.fx`` tracer record ``module`` as a whole: one node that calls it.

    Tracers keep only the modules of ``torch.nn`` whole and trace into all others, so ``module`` calls this itself.
    """
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), (input,), {})
