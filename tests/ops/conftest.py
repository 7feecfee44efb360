import pytest

from gng_d2.ops import set_kernels_enabled


@pytest.fixture(autouse=True)
def kernels_are_on():
    """Those for CUDA too, which may be off by default."""
    with set_kernels_enabled("cuda"):
        yield
