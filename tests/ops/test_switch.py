import os
import subprocess
import sys

import pytest
import torch
from needs import KERNELS
from torch.nn import functional as F

from gng_d2.ops import cpu_kernels, group_norm, set_kernels_enabled, standardize_weight

pytestmark = [
    pytest.mark.skipif(not cpu_kernels.is_compiled(), reason="gng_d2 was installed without a C compiler"),
    KERNELS,
]


@pytest.fixture(autouse=True)
def on():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
    set_kernels_enabled(True)


def uses_kernels():
    """Whether group norm and weight standardization do, which agree."""
    x = torch.randn(1, 64, 128, 128, requires_grad=True)
    outputs = group_norm(x, 1), standardize_weight(torch.randn(4, 9, requires_grad=True))
    used = {type(y.grad_fn).__name__ in ("_GroupNormBackward", "_StandardizeBackward") for y in outputs}
    assert len(used) == 1
    with torch.no_grad():
        torch.testing.assert_close(group_norm(x, 1), F.group_norm(x, 1))
    return used.pop()


def test_switch():
    assert uses_kernels()
    set_kernels_enabled(False)
    assert not uses_kernels()
    set_kernels_enabled(True)
    assert uses_kernels()


def test_switch_as_a_context():
    with set_kernels_enabled(False):
        assert not uses_kernels()
        with set_kernels_enabled(True):
            assert uses_kernels()
        assert not uses_kernels()
    assert uses_kernels()
    with pytest.raises(KeyError), set_kernels_enabled(False):
        raise KeyError
    assert uses_kernels()


def test_off_gives_pytorchs_bits():
    x, (weight, bias) = torch.randn(1, 64, 128, 128), torch.randn(2, 64)
    with set_kernels_enabled(False):
        assert torch.equal(group_norm(x, 1, weight, bias), F.group_norm(x, 1, weight, bias))


ENVIRONMENT = """
import torch
from gng_d2.ops import group_norm
torch.set_num_threads(4)
print(type(group_norm(torch.randn(1, 64, 128, 128, requires_grad=True), 1).grad_fn).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("value, expected", [("0", "NativeGroupNormBackward0"), ("off", "")])
def test_environment_variable(value, expected):
    environment = {**os.environ, "GNG_D2_KERNELS": value}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENVIRONMENT], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == expected, run.stderr
    assert expected or "GNG_D2_KERNELS is 'off': set it to 0 (kernels off) or 1 (on)" in run.stderr
