from pathlib import Path

import torch
from torch import nn

from gng_d2 import GroupNorm, PracticalGroupNorm, WSConv2d


def test_a_whole_model_pickled_by_version_0_1():
    """It names ``gng_d2.layers.practical_group_norm`` and ``.weight_standardization``, and was made at 6a364c4."""
    old = torch.load(Path(__file__).with_name("model_0.1.pth"), weights_only=False)
    model = old["model"]
    assert [type(m) for m in model] == [WSConv2d, PracticalGroupNorm, nn.ReLU, nn.Conv2d, GroupNorm]
    torch.testing.assert_close(model(old["input"]), old["output"])
    assert repr(model) and not model[1].weight_standardization_folded
