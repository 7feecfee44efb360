import os
import tempfile

import pytest

# Before anything of Detectron2 is imported: its dataset root is read once. The tests draw their own data.
_root = tempfile.TemporaryDirectory(prefix="gng_d2-tests-")
os.environ["DETECTRON2_DATASETS"] = _root.name


@pytest.fixture(scope="session")
def shapes():
    """The dataset root, with a few images of the embedded dataset."""
    from gng_d2.data import embedded

    embedded.draw(embedded.datasets_root(), {"train": 8, "val": 6})
    return embedded.datasets_root()
