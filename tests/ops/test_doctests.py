import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["ops.backends", "ops.group_norm", "ops.weight_standardization", "layers.ws_conv"])
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"gng_d2.{module}"))
    assert result.attempted and not result.failed
