"""Our norms in the table by which PyTorch's eager quantization knows modules."""

import sys

from torch import nn

from .group_norm import GroupNorm, PracticalGroupNorm

__all__ = ["extend_quantization"]


def extend_quantization() -> None:
    """Have ``torch.ao.quantization.convert`` treat our norms as it treats :class:`torch.nn.GroupNorm`.

    It looks modules up by their exact class, and would leave what ``get_norm("GN")`` makes, which is a class of ours,
    in float. Does nothing where ``torch.ao.quantization`` is not imported.
    """
    mappings = sys.modules.get("torch.ao.quantization.quantization_mappings")
    table = getattr(mappings, "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS", {})
    if nn.GroupNorm in table:
        table[GroupNorm] = table[PracticalGroupNorm] = table[nn.GroupNorm]
