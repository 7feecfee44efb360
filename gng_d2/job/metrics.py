"""What the metrics.json that Detectron2 writes of a run says."""

import json
import os
from contextlib import suppress

__all__ = ["last_record", "read_metrics"]


def read_metrics(path: str, most: int | None = None) -> list[dict]:
    """The records of a run, by iteration.

    What a run wrote after the checkpoint from which it was resumed, and what an earlier run wrote to the same file,
    is left out. So are lines that are no records, as a run that is killed may leave them.

    Args:
        most: bytes at the end of the file to read, by default all.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    records, latest = {}, -1
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most) if most else 0)
        for line in file:
            with suppress(ValueError, RecursionError, TypeError, KeyError):
                record = json.loads(line)
                iteration = record["iteration"]
                numbers = all(type(value) in (int, float) for value in record.values())
                if type(iteration) is not int or iteration >= 2**63 or not numbers:
                    continue
                if "total_loss" in record:  # an evaluation may be written after later losses
                    if iteration <= latest:
                        records = {i: r for i, r in records.items() if i < iteration}
                    latest = iteration
                records[iteration] = record
    return [records[iteration] for iteration in sorted(records)]


def last_record(path: str) -> dict:
    """The last of :func:`read_metrics`, {"iteration": -1} if there is none. Only the end of the file is read."""
    with suppress(OSError, IndexError):
        return read_metrics(path, most=2**16)[-1]
    return {"iteration": -1}
