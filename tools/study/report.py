"""What the finished runs of a comparison say: mean and spread over seeds, paired differences, curves."""

import math
import os
import shlex
import statistics
from typing import Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from scipy import stats
from tabulate import tabulate

from gng_d2.config import load_config
from gng_d2.files import read_metrics, write_rows

from .comparison import Comparison, Run, differences
from .paper import TABLE_5, TABLE_6
from .plots import plot_channels_per_group, plot_comparison

__all__ = ["METRICS", "final_values", "paper_values", "summarize", "write_report"]

# in percent, by their names in Detectron2
METRICS = {
    "PQ": "panoptic_seg/PQ",
    "PQ_th": "panoptic_seg/PQ_th",
    "PQ_st": "panoptic_seg/PQ_st",
    "SQ": "panoptic_seg/SQ",
    "RQ": "panoptic_seg/RQ",
    "AP": "bbox/AP",
    "AP50": "bbox/AP50",
    "AP75": "bbox/AP75",
    "mIoU": "sem_seg/mIoU",
}
LOSS = "total_loss"

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "configs")
# keys that leave the training what it is
NEUTRAL = {
    *("SEED", "OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TEST.EVAL_PERIOD"),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE"),
}


def paper_values(cfg: CfgNode) -> Dict[str, float]:
    """The paper's row for the training that ``cfg`` is, empty where it is none of the tables'."""
    for name, values in {**TABLE_5, **TABLE_6}.items():
        path = os.path.join(CONFIGS, name)
        if os.path.isfile(path) and differences(cfg, load_config(path)).keys() <= NEUTRAL:
            return values
    return {}


def final_values(run: Run) -> Dict[str, float]:
    """A finished run's metrics (None: Detectron2 found no detections to evaluate). Where it had no evaluation, its
    loss: the mean over the last tenth of its iterations."""
    records = read_metrics(run.path("metrics.json"))
    last = {name: value for record in records for name, value in record.items()}
    values = {k: None if math.isnan(last[name]) else last[name] for k, name in METRICS.items() if name in last}
    if values:
        return values
    end = 0.9 * last["iteration"]
    return {LOSS: statistics.fmean(r[LOSS] for r in records if LOSS in r and r["iteration"] >= end)}


def summarize(values: Dict[str, Dict[int, Dict[str, float]]], paper: Dict[str, Dict[str, float]]) -> List[Dict]:
    """A row for each norm and metric.

    Args:
        values: by norm, seed and metric. Differences are taken to the first norm, seed by seed.
        paper: the paper's values by norm and metric.

    Keys: ``norm``, ``metric``, ``seeds``, ``values`` (one a seed), ``mean``, ``std`` (n - 1), ``paper``;
    ``difference``: mean of the paired differences over the seeds that both norms have, ``difference_error``:
    its standard error, ``difference_seeds``: how many. None stands for what there is too little for.
    """
    baseline = next(iter(values))
    metrics = list(dict.fromkeys(m for by_seed in values.values() for row in by_seed.values() for m in row))
    rows = []
    for norm, by_seed in values.items():
        for metric in metrics:
            of_seed = {seed: row[metric] for seed, row in by_seed.items() if metric in row}
            first = {seed: row[metric] for seed, row in values[baseline].items() if metric in row}
            common = [seed for seed in of_seed if seed in first and norm != baseline]
            pairs = [None if None in (of_seed[s], first[s]) else of_seed[s] - first[s] for s in common]
            rows.append(
                {
                    "norm": norm,
                    "metric": metric,
                    "seeds": list(of_seed),
                    "values": list(of_seed.values()),
                    "mean": _mean(of_seed.values()),
                    "std": _std(of_seed.values()),
                    "paper": paper.get(norm, {}).get(metric),
                    "difference": _mean(pairs),
                    "difference_error": _std(pairs) and _std(pairs) / math.sqrt(len(pairs)),
                    "difference_seeds": len(pairs),
                }
            )
    return rows


def _mean(values):
    return statistics.fmean(values) if values and None not in values else None


def _std(values):
    return statistics.stdev(values) if len(values) > 1 and None not in values else None


def results_table(rows: List[Dict]) -> List[Dict]:
    """A line for each norm, ``mean ± standard deviation`` in a column for each metric, the paper's line below."""
    lines = []
    for norm, by_metric in _by_norm(rows).items():
        seeds = max(len(row["seeds"]) for row in by_metric.values())
        cells = {metric: _cell(row["mean"], row["std"]) for metric, row in by_metric.items()}
        lines.append({"norm": norm, "seeds": seeds, **cells})
        if any(row["paper"] for row in by_metric.values()):
            cells = {metric: _cell(row["paper"]) for metric, row in by_metric.items()}
            lines.append({"norm": f"{norm} in the paper", "seeds": "", **cells})
    return lines


def differences_table(rows: List[Dict]) -> List[Dict]:
    """A line for each norm but the first, ``paired difference (its 95 % interval)``, the paper's line below."""
    (baseline, first), *others = _by_norm(rows).items()
    paper_first = {metric: row["paper"] for metric, row in first.items()}
    lines = []
    for norm, by_metric in others:
        seeds = max(row["difference_seeds"] for row in by_metric.values())
        cells = {metric: _difference_cell(row) for metric, row in by_metric.items()}
        lines.append({"difference": f"{norm} - {baseline}", "seeds": seeds, **cells})
        paper = {m: row["paper"] - paper_first[m] for m, row in by_metric.items() if row["paper"] and paper_first[m]}
        if paper:
            cells = {metric: _cell(paper.get(metric), sign="+") for metric in by_metric}
            lines.append({"difference": f"{norm} - {baseline} in the paper", "seeds": "", **cells})
    return lines


def _by_norm(rows):
    by_norm = {}
    for row in rows:
        by_norm.setdefault(row["norm"], {})[row["metric"]] = row
    return by_norm


def _cell(value, spread=None, sign=""):
    if value is None:
        return "-"
    return f"{value:{sign}.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def _difference_cell(row):
    interval = difference_interval(row)
    if interval is None:
        return _cell(row["difference"], sign="+")
    low, high = interval
    return f"{row['difference']:+.2f} ({low:+.2f} to {high:+.2f})" + " *" * (low > 0 or high < 0)


def difference_interval(row: Dict) -> Optional[Tuple[float, float]]:
    """The 95 % interval of a row's difference, by Student's t: what its seeds leave open. None for a single seed."""
    error, seeds = row["difference_error"], row["difference_seeds"]
    if error is None:
        return None
    half = float(stats.t.ppf(0.975, seeds - 1)) * error
    return row["difference"] - half, row["difference"] + half


def intervals_note(rows: List[Dict]) -> str:
    """What a reader must know of the intervals in :func:`differences_table`: how they were made, and how many."""
    count = sum(difference_interval(row) is not None for row in rows)
    if not count:
        return "Differences of a single seed: no interval, so no conclusion."
    return (
        "Mean of the differences seed by seed, with its 95 % interval (Student's t). `*`: the interval leaves out 0; "
        "without it, the seeds alone may explain the difference. "
        f"{count} comparison{'s were' if count > 1 else ' was'} made here, and of twenty that the seeds do explain, "
        f"one gets a `*`."
    )


def write_report(comparison: Comparison) -> str:
    """Write results.json, results.md, curves.png and channels_per_group.png of what has finished into the
    comparison's folder.

    A row of results.json has beside what :func:`summarize` gives ``channels_per_group``: how many channels in a group
    how many of the layers under test have, as pairs; ``curves``: (iteration, value) by seed, where
    :func:`curves_of` has them; and the ``machine``.

    Returns the text of results.md.
    """
    finished = [run for run in comparison.runs if run.state()["status"] == "finished"]
    machines = sorted({run.state()["machine"] for run in finished})
    values, curves = {norm: {} for norm in comparison.norms}, {}
    for run in finished:
        values[run.norm][run.seed] = final_values(run)
        for quantity, points in curves_of(run, comparison.cfg.SOLVER.MAX_ITER).items():
            curves.setdefault(quantity, {}).setdefault(run.norm, {})[run.seed] = points
    paper = {norm: paper_values(comparison.norm_cfg(norm)) for norm in comparison.norms}
    rows = summarize(values, paper)
    channels = {norm: list(comparison.channels_per_group(norm).items()) if values[norm] else [] for norm in values}
    for row in rows:
        row["channels_per_group"] = channels[row["norm"]]
        row["curves"] = curves.get(row["metric"], {}).get(row["norm"], {})
        row["machine"] = "; ".join(machines)
    write_rows(os.path.join(comparison.output, "results.json"), rows)
    if curves:
        plot_comparison(curves, os.path.join(comparison.output, "curves.png"))
    if rows:
        first = [row for row in rows if row["metric"] == rows[0]["metric"]]
        plot_channels_per_group(first, os.path.join(comparison.output, "channels_per_group.png"))
    text = report(comparison, rows, machines)
    with open(os.path.join(comparison.output, "results.md"), "w") as file:
        file.write(text)
    return text


def curves_of(run: Run, max_iter: int) -> Dict[str, List]:
    """(iteration, value) of the loss, and of the first of METRICS that the run has."""
    records = read_metrics(run.path("metrics.json"))
    metric = next((short for short, name in METRICS.items() if any(name in record for record in records)), None)
    names = {LOSS: LOSS, **({metric: METRICS[metric]} if metric else {})}
    # a run resumed for its last evaluation alone counts one more
    return {k: [(min(r["iteration"], max_iter), r[name]) for r in records if name in r] for k, name in names.items()}


def report(comparison: Comparison, rows: List[Dict], machines: Sequence[str]) -> str:
    """The tables in Markdown, with what was run and what did not finish."""
    solver = comparison.cfg.SOLVER
    open_runs = [run for run in comparison.runs if run.state()["status"] != "finished"]
    parts = [
        f"# {', '.join(comparison.norms)} in {comparison.config_file}",
        f"{len(comparison.runs) - len(open_runs)} of {len(comparison.runs)} runs finished: "
        f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, each norm as {', '.join(comparison.keys)}."
        + f" Overrides: {shlex.join(comparison.overrides)}." * bool(comparison.overrides)
        + f" Trained on {'; '.join(machines)}." * bool(machines),
    ]
    if rows:
        parts += [
            _markdown(results_table(rows)),
            "Mean ± standard deviation over seeds, after the last iteration."
            + " total_loss: mean over the last tenth of the iterations." * (rows[0]["metric"] == LOSS),
        ]
    if any(row["difference_seeds"] for row in rows):
        parts += [
            _markdown(differences_table(rows)),
            intervals_note(rows),
        ]
    if rows:
        parts.append("![loss and metric over the iterations](curves.png)")
        parts.append("![metric over the channels in a group](channels_per_group.png)")
    if open_runs:
        parts.append("\n".join(f"- {run}: {_open_state(run)}" for run in open_runs))
    return "\n\n".join(parts) + "\n"


def _open_state(run):
    state = run.state()
    if state["status"] == "failed":
        return f"failed: {state['reason']} ({run.path('output.txt')})"
    return state["status"]


def _markdown(lines):
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
