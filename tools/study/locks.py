"""Locks between processes, as files. Where the file system has none, nothing is locked."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lock(path: str, wait: bool) -> Iterator[None]:
    """Hold the lock of the file ``path``, which is made.

    Raises:
        BlockingIOError: another process holds it, and this one does not ``wait``.
        OSError: the file cannot be made.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
