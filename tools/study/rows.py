"""A folder for each training run, so that a job of many runs that was stopped goes on where it was."""

import os
import statistics
from typing import Dict, Optional, Sequence, Tuple

from gng_d2.errors import InputError
from gng_d2.files import check_outputs, read_rows, write_rows

__all__ = ["open_run", "finish_run", "mean_and_std"]

_SETTINGS, _ROW = "settings.json", "row.json"


def open_run(folder: str, settings: Dict) -> Optional[Dict]:
    """The row of the run in ``folder`` if it is finished; None if it is new or was stopped.

    Raises:
        InputError: the folder cannot be written, or holds a run of other settings.
    """
    path = os.path.join(folder, _SETTINGS)
    check_outputs(path)
    if not os.path.exists(path):
        write_rows(path, [settings])
    (before,) = read_rows(path)
    if before != settings:
        keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        differ = ", ".join(f"{key} {before.get(key)} (now {settings.get(key)})" for key in keys)
        raise InputError(f"{folder} holds a run with {differ}. Choose another --output, or delete that folder")
    row = os.path.join(folder, _ROW)
    return read_rows(row)[0] if os.path.exists(row) else None


def finish_run(folder: str, row: Dict) -> None:
    write_rows(os.path.join(folder, _ROW), [row])


def mean_and_std(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """The mean over seeds and the sample standard deviation, None for a single seed."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
