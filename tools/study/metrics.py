"""Read and draw the metrics.json that Detectron2 writes in a run."""

import json
import os
from contextlib import suppress

from matplotlib.figure import Figure

from gng_d2.job.files import save_figure


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


def plot_losses(metrics_json: str, path: str) -> None:
    """Draw the loss curves of a run from its metrics.json, which Detectron2 writes."""
    records = [record for record in read_metrics(metrics_json) if "total_loss" in record]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key in sorted({k for r in records for k in r if k.startswith("loss_")}, key=lambda k: -records[0].get(k, 0)):
        axes.plot([r["iteration"] for r in records if key in r], [r[key] for r in records if key in r], lw=1, label=key)
    axes.plot([r["iteration"] for r in records], [r["total_loss"] for r in records], "k", lw=1.6, label="total_loss")
    axes.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    axes.legend(fontsize=8)
    save_figure(figure, path, dpi=120)
