import logging
import os
import random
import resource
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

# The tests name files from the root of the checkout, wherever pytest was started.
os.chdir(Path(__file__).parents[1])

# A shell lets its background jobs ignore it, and theirs, which the tests interrupt and wait for.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before triton is imported: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Before anything of Detectron2 is imported: its dataset root is read once. The tests draw their own data.
_root = tempfile.TemporaryDirectory(prefix="gng_d2-tests-")
os.environ["DETECTRON2_DATASETS"] = _root.name


with suppress(ModuleNotFoundError):  # the tests that are marked gpu run without it
    import hypothesis

    # The same examples in every run, and no limit to the time of one: the machine may be busy.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Slow tests first, so that no process begins a long one when the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """Sets the number of PyTorch's threads, which is what it was after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@contextmanager
def _limited_file_size(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def limited_file_size():
    """A context in which no file grows beyond as many bytes, as on a disk that is full then."""
    return _limited_file_size


@pytest.fixture(autouse=True)
def loggers():
    """A job sets up its loggers for good: it takes them from the root, where pytest's ``caplog`` reads, and has them
    write to the terminal, which is closed when its test ends."""
    names = ("detectron2", "fvcore", "gng_d2")
    before = [(logger, logger.level, logger.handlers[:]) for logger in map(logging.getLogger, names)]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:], logger.propagate = handlers, True
    with suppress(KeyError):
        sys.modules["detectron2.utils.logger"].setup_logger.cache_clear()


@pytest.fixture(scope="session")
def shapes():
    """The dataset root, with a few images of the embedded dataset."""
    from gng_d2.job.data import embedded

    embedded.draw(embedded.datasets_root(), {"train": 8, "val": 6})
    return embedded.datasets_root()
