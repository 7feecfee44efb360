import importlib
from functools import partial

import pytest
import torch

from gng_d2.ops import set_kernels_enabled

group_norm_op = importlib.import_module("gng_d2.ops.group_norm")  # `gng_d2.ops.group_norm` is the function


@pytest.fixture(autouse=True)
def kernels_are_on():
    """Those for CUDA too, which may be off by default."""
    with set_kernels_enabled("cuda"):
        yield


@pytest.fixture
def register():
    """Has the ops of group norm run a backend's kernels for tensors on a CPU, Triton's in its interpreter."""
    libraries = []

    def run(backend):
        libraries.append(torch.library.Library("gng_d2", "IMPL"))
        for name, (op, _) in group_norm_op._OPS.items():
            libraries[-1].m.impl(name, "CPU", partial(op, backend))
        return libraries[-1].m

    yield run
    for library in libraries:
        library._destroy()


@pytest.fixture
def threads(set_threads):
    """PyTorch has four threads: none of them would idle in 32 groups, and some would in one."""
    set_threads(4)
