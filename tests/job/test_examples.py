"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from needs import LOOK, RECOMPUTE
from torch import nn

import gng_d2

GIVEN = {"torch": torch, "nn": nn, **{name: getattr(gng_d2, name) for name in gng_d2.__all__}}

MODULES = [m.name for m in pkgutil.walk_packages(gng_d2.__path__, "gng_d2.") if not m.name.endswith("__main__")]


NEEDS = {"gng_d2.layers.look": LOOK, "gng_d2.models.recompute_norms": RECOMPUTE}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEEDS.get(name, ())) for name in MODULES if "_cpu_kernels" not in name]
)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a file
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))  # of Triton, say
    assert doctest.testmod(module, extraglobs=GIVEN).failed == 0
