"""What a test needs of the versions that are installed."""

import sys

import pytest
import torch


def needs_torch(major, minor, what):
    """Skips a test, a parameter or, as ``pytestmark``, a file on an older PyTorch, which lacks ``what``.

    The version is the first that has it of those that were tried, so some between may have it too.
    """
    return pytest.mark.skipif(torch.__version__ < (major, minor), reason=f"needs PyTorch {major}.{minor}: {what}")


COMPILE = pytest.mark.skipif(
    sys.version_info >= (3, 11) and torch.__version__ < (2, 1), reason="needs PyTorch 2.1: torch.compile in Python 3.11"
)
KERNELS = needs_torch(2, 4, "torch.library.register_fake, for kernels of ours")
LOOK = needs_torch(2, 5, "autograd's shapes in Python, for the look at who made a norm's input")
RECOMPUTE = needs_torch(2, 5, "checkpoints that choose what they keep, for recompute_norms")
PARAMETRIZED_WEIGHT_NORM = needs_torch(2, 1, "torch.nn.utils.parametrizations.weight_norm")
HALF = pytest.param(torch.float16, marks=needs_torch(2, 4, "PyTorch's ops of float16 on a CPU"))
EXPORT = needs_torch(2, 6, "torch.export as the formats onnx and torch_export take it")
