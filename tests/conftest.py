import os
import tempfile

import pytest
import torch

# Before triton is imported: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Before anything of Detectron2 is imported: its dataset root is read once. The tests draw their own data.
_root = tempfile.TemporaryDirectory(prefix="gng_d2-tests-")
os.environ["DETECTRON2_DATASETS"] = _root.name


@pytest.fixture(scope="session")
def shapes():
    """The dataset root, with a few images of the embedded dataset."""
    from gng_d2.data import embedded

    embedded.draw(embedded.datasets_root(), {"train": 8, "val": 6})
    return embedded.datasets_root()
