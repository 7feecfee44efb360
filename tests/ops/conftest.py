import pytest
import torch

from gng_d2.ops import set_kernels_enabled


@pytest.fixture(autouse=True)
def kernels_are_on():
    """Those for CUDA too, which may be off by default."""
    with set_kernels_enabled("cuda"):
        yield


@pytest.fixture
def threads():
    """PyTorch has four threads: none of them would idle in 32 groups, and some would in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
