"""What the metrics.json that Detectron2 writes of a run says."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

__all__ = ["last_record", "read_metrics"]


def read_metrics(path: str) -> list[dict]:
    """The records of a run, by iteration.

    What a run wrote after the checkpoint from which it was resumed, and what an earlier run wrote to the same file,
    is left out. So are lines that are no records, as a run that is killed may leave them.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    records, latest = {}, -1
    with open(path, "rb") as file:
        for record in _records(file):
            iteration = record["iteration"]
            if "total_loss" in record:  # an evaluation may be written after later losses
                if iteration <= latest:
                    records = {i: r for i, r in records.items() if i < iteration}
                latest = iteration
            records[iteration] = record
    return [records[iteration] for iteration in sorted(records)]


def last_record(path: str) -> dict:
    """The last record of a run, {"iteration": -1} if there is none. Only the end of the file is read."""
    none = {"iteration": -1}
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2**16))
            return [none, *_records(file)][-1]
    except OSError:
        return none


def _records(lines: Iterable[bytes]) -> Iterator[dict]:
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and all(type(value) in (int, float) for value in record.values()):
                if type(record.get("iteration")) is int and record["iteration"] < 2**63:
                    yield record
