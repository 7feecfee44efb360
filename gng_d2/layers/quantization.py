"""Add our norms to the table of modules that PyTorch's eager quantization knows."""

import sys

from torch import nn

from .group_norm import GroupNorm, PracticalGroupNorm

__all__ = ["extend_quantization"]


def extend_quantization() -> None:
    """Have ``torch.ao.quantization.convert`` treat our norms as it treats :class:`torch.nn.GroupNorm`.

    PyTorch looks modules up by their exact class, so it would leave our norms, such as what ``get_norm("GN")`` makes,
    in float. This does nothing if ``torch.ao.quantization`` is not imported.
    """
    mappings = sys.modules.get("torch.ao.quantization.quantization_mappings")
    table = getattr(mappings, "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS", {})
    if nn.GroupNorm in table:
        table[GroupNorm] = table[PracticalGroupNorm] = table[nn.GroupNorm]
