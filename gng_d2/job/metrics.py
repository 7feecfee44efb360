"""Read the metrics.json that Detectron2 writes in a run."""

import json
import os
from contextlib import suppress


def read_metrics(path: str, most: int | None = None) -> list[dict]:
    """The records of a run, in the order of their iterations.

    Three kinds of lines are left out: what an earlier run wrote to the same file, what this run wrote after the
    checkpoint from which it resumed, and what is no record, as a run that is killed may leave half a line.

    Args:
        most: how many bytes to read at the end of the file, by default all.

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
                if "total_loss" in record:  # not an evaluation, which may be written after later losses
                    if iteration <= latest:
                        records = {i: r for i, r in records.items() if i < iteration}
                    latest = iteration
                records[iteration] = record
    return [records[iteration] for iteration in sorted(records)]


def last_record(path: str) -> dict:
    """The last of :func:`read_metrics`, or {"iteration": -1} if there is none. Only the end of the file is read."""
    with suppress(OSError, IndexError):
        return read_metrics(path, most=2**16)[-1]
    return {"iteration": -1}
