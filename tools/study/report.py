"""What the finished runs of a comparison say: mean and spread over seeds, paired differences, curves."""

import math
import os
import shlex
import statistics
from dataclasses import dataclass, replace

import numpy as np
from detectron2.config import CfgNode
from matplotlib.figure import Figure
from scipy import stats

from gng_d2.job.config import load_config
from gng_d2.job.files import atomic_open, read_metrics, save_figure
from gng_d2.layers.ws_conv import WS

from . import ROOT
from .comparison import Comparison, Run
from .paper import TABLE_5, TABLE_6
from .rows import differences, markdown, mean_and_std, write_rows

__all__ = ["METRICS", "ComparisonRow", "final_values", "paper_values", "summarize", "table", "together"]
__all__ += ["write_report"]

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


# keys that leave the training what it is
NEUTRAL = {
    *("SEED", "OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TEST.EVAL_PERIOD"),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE"),
}


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One metric under one norm. None stands for what there is too little for."""

    norm: str
    metric: str  # one of METRICS, in percent, or LOSS
    seeds: list[int]
    values: list[float | None]  # one a seed
    mean: float | None
    std: float | None  # n - 1
    paper: float | None
    difference: float | None  # to the first norm: the mean of the differences seed by seed
    difference_error: float | None  # its standard error
    difference_seeds: int  # how many seeds both norms have
    channels_per_group: list[tuple[int, int]] = ()  # of the layers under test: (channels in a group, how many layers)
    curves: dict[int, list[tuple[int, float]]] | None = None  # (iteration, value) by seed, where curves_of has them
    machine: str = ""
    commit: str = ""  # of the code that trained it


def paper_values(cfg: CfgNode) -> dict[str, float]:
    """The paper's row for the training that ``cfg`` is, empty where it is none of the tables'."""
    for name, values in {**TABLE_5, **TABLE_6}.items():
        if differences(cfg, load_config(os.path.join(ROOT, "configs", name))).keys() <= NEUTRAL:
            return values
    return {}


def final_values(run: Run) -> dict[str, float | None]:
    """A finished run's metrics (None: Detectron2 found no detections to evaluate). Where it had no evaluation, its
    loss: the mean over the last tenth of its iterations."""
    records = read_metrics(run.path("metrics.json"))
    last = {name: value for record in records for name, value in record.items() if isinstance(value, (int, float))}
    values = {k: None if math.isnan(last[name]) else last[name] for k, name in METRICS.items() if name in last}
    if values:
        return values
    losses = [r[LOSS] for r in records if LOSS in r and r["iteration"] >= 0.9 * last["iteration"]]
    return {LOSS: statistics.fmean(losses)} if losses else {}


def summarize(
    values: dict[str, dict[int, dict[str, float | None]]], paper: dict[str, dict[str, float]]
) -> list[ComparisonRow]:
    """Compare the norms in each metric.

    Args:
        values: by norm, seed and metric. Differences are taken to the first norm, seed by seed.
        paper: the paper's values by norm and metric.
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
            mean, std = mean_and_std(list(of_seed.values()))
            difference, deviation = mean_and_std(pairs)
            rows.append(
                ComparisonRow(
                    norm=norm,
                    metric=metric,
                    seeds=list(of_seed),
                    values=list(of_seed.values()),
                    mean=mean,
                    std=std,
                    paper=paper.get(norm, {}).get(metric),
                    difference=difference,
                    difference_error=None if deviation is None else deviation / math.sqrt(len(pairs)),
                    difference_seeds=len(pairs),
                )
            )
    return rows


def together(rows: list[ComparisonRow]) -> list[ComparisonRow]:
    """Rows of several comparisons as if they were of one, in which the first row's norm is the baseline."""
    values = {}
    for row in rows:
        of_norm = values.setdefault(row.norm, {})
        for seed, value in zip(row.seeds, row.values):
            of_norm.setdefault(seed, {})[row.metric] = value
    return summarize(values, {})


def table(rows: list[ComparisonRow]) -> str:
    """What the seeds say of each norm and of the differences, with what a reader must know of both."""
    parts = [
        _results_table(rows),
        "Mean ± standard deviation over seeds, after the last iteration."
        + " total_loss: mean over the last tenth of the iterations." * (rows[0].metric == LOSS),
    ]
    if any(row.difference_seeds for row in rows):
        parts += [_differences_table(rows), intervals_note(rows)]
    return "\n\n".join(parts)


def _results_table(rows):
    """A line for each norm, ``mean ± standard deviation`` in a column for each metric, the paper's line below."""
    lines = []
    for norm, by_metric in _by_norm(rows).items():
        seeds = max(len(row.seeds) for row in by_metric.values())
        lines.append([norm, seeds, *(_cell(row.mean, row.std) for row in by_metric.values())])
        if any(row.paper for row in by_metric.values()):
            lines.append([f"{norm} in the paper", "", *(_cell(row.paper) for row in by_metric.values())])
    return markdown(lines, ["norm", "seeds", *_metrics(rows)])


def _differences_table(rows):
    """A line for each norm but the first, ``paired difference (its 95 % interval)``, the paper's line below."""
    (baseline, first), *others = _by_norm(rows).items()
    lines = []
    for norm, by_metric in others:
        seeds = max(row.difference_seeds for row in by_metric.values())
        lines.append([f"{norm} - {baseline}", seeds, *map(_difference_cell, by_metric.values())])
        paper = {m: row.paper - first[m].paper for m, row in by_metric.items() if row.paper and first[m].paper}
        if paper:
            cells = [_cell(paper.get(metric), sign="+") for metric in by_metric]
            lines.append([f"{norm} - {baseline} in the paper", "", *cells])
    return markdown(lines, ["difference", "seeds", *_metrics(rows)])


def _by_norm(rows):
    by_norm = {}
    for row in rows:
        by_norm.setdefault(row.norm, {})[row.metric] = row
    return by_norm


def _metrics(rows):
    return list(dict.fromkeys(row.metric for row in rows))


def _cell(value, spread=None, sign=""):
    if value is None:
        return "-"
    return f"{value:{sign}.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def _difference_cell(row):
    interval = difference_interval(row)
    if interval is None:
        return _cell(row.difference, sign="+")
    low, high = interval
    return f"{row.difference:+.2f} ({low:+.2f} to {high:+.2f})" + " *" * (low > 0 or high < 0)


def difference_interval(row: ComparisonRow) -> tuple[float, float] | None:
    """The 95 % interval of a row's difference, by Student's t: what its seeds leave open. None for a single seed."""
    if row.difference_error is None:
        return None
    half = float(stats.t.ppf(0.975, row.difference_seeds - 1)) * row.difference_error
    return row.difference - half, row.difference + half


def intervals_note(rows: list[ComparisonRow]) -> str:
    """What a reader must know of the intervals: how they were made, and how many."""
    count = sum(difference_interval(row) is not None for row in rows)
    if not count:
        return "Differences of a single seed: no interval, so no conclusion."
    return (
        "Mean of the differences seed by seed, with its 95 % interval (Student's t). `*`: the interval leaves out 0; "
        "without it, the seeds alone may explain the difference. "
        f"{count} comparison{'s were' if count > 1 else ' was'} made here, and of twenty that the seeds do explain, "
        f"one gets a `*`."
    )


def curves_of(run: Run, max_iter: int) -> dict[str, list]:
    """(iteration, value) of the loss, and of the first of METRICS that the run has."""
    records = read_metrics(run.path("metrics.json"))
    metric = next((short for short, name in METRICS.items() if any(name in record for record in records)), None)
    names = {LOSS: LOSS, **({metric: METRICS[metric]} if metric else {})}
    # a run resumed for its last evaluation alone counts one more, and may have been evaluated before
    curves = {k: {min(r["iteration"], max_iter): r[name] for r in records if name in r} for k, name in names.items()}
    return {quantity: list(points.items()) for quantity, points in curves.items() if points}


def plot_curves(curves: dict[str, dict[str, dict]], path: str) -> None:
    """Draw a panel for each quantity, over iterations, with a line for each norm: the mean over its seeds in a band
    of one standard deviation on either side.

    Args:
        curves: by quantity ("total_loss", "PQ"), norm and seed the list of (iteration, value).
    """
    figure = Figure(figsize=(6.5 * len(curves), 4.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (quantity, by_norm) in zip(panels, curves.items()):
        for norm, by_seed in by_norm.items():
            iterations, values = _binned(list(by_seed.values()))
            mean = values.mean(axis=0)
            marker = "o" if len(iterations) < 20 else ""
            label = f"{norm}, {len(values)} seed{'s' * (len(values) > 1)}"
            (line,) = axes.plot(iterations, mean, f"{marker}-", lw=1.2, ms=4, label=label)
            if len(values) > 1:
                deviation = values.std(axis=0, ddof=1)
                band = axes.fill_between if len(iterations) > 1 else axes.vlines
                band(iterations, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.25)
        axes.set(xlabel="iteration", ylabel=quantity)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, title="mean ± standard deviation", title_fontsize=8)
    save_figure(figure, path, dpi=120)


def plot_channels_per_group(rows: list[ComparisonRow], path: str) -> None:
    """Draw which group size does best: for rows of one metric, a point a seed over the channels in a group, a dash at
    their mean, PGN and GN1 in colours of their own.

    Where a norm's layers differ in it (PGN; GN, as layers differ in width), it stands at their geometric mean and a
    line reaches from the lowest to the highest.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = {"PGN": "tab:red", "GN1": "tab:blue"}
    for row in rows:
        values = [value for value in row.values if value is not None]
        if not values or not row.channels_per_group:
            continue
        channels, layers = np.array(row.channels_per_group, dtype=float).T
        middle = np.exp2(np.average(np.log2(channels), weights=layers))
        mean = np.mean(values)
        colour = colours.get(row.norm.removesuffix(WS), "0.35")
        axes.plot([channels.min(), channels.max()], [mean, mean], color=colour, lw=0.8, alpha=0.5)
        axes.plot([middle] * len(values), values, "o", color=colour, ms=5, alpha=0.7)
        axes.plot(middle, mean, "_", color=colour, ms=18, mew=2)
        axes.annotate(row.norm, (middle, max(values)), (0, 7), textcoords="offset points", ha="center", color=colour)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.margins(y=0.15)
    axes.set(xlabel="channels in a group, layers under test", ylabel=rows[0].metric)
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


def _binned(series, bins=100):
    """(mean iteration (n,), values (len(series), n)) in up to ``bins`` stretches of iterations that all series have."""
    points = [np.array(s, dtype=float) for s in series]
    last = max(p[-1, 0] for p in points)
    numbers = [np.minimum(p[:, 0] * bins // (last + 1), bins - 1).astype(int) for p in points]
    common = sorted(set.intersection(*(set(n) for n in numbers)))
    values = [[p[n == b, 1].mean() for b in common] for p, n in zip(points, numbers)]
    iterations = [points[0][numbers[0] == b, 0].mean() for b in common]
    return np.array(iterations), np.array(values)


def write_report(comparison: Comparison) -> str:
    """Write results.json, results.md, curves.png and channels_per_group.png of what has finished into the
    comparison's folder, and return the text of results.md."""
    finished = [run for run in comparison.runs if comparison.state(run).status == "finished"]
    machines = sorted({comparison.state(run).machine for run in finished})
    commits = sorted({comparison.state(run).commit or "unknown" for run in finished})
    values, curves = {norm: {} for norm in comparison.norms}, {}
    for run in finished:
        values[run.norm][run.seed] = final_values(run)
        for quantity, points in curves_of(run, comparison.cfg.SOLVER.MAX_ITER).items():
            curves.setdefault(quantity, {}).setdefault(run.norm, {})[run.seed] = points
    paper = {norm: paper_values(comparison.norm_cfg(norm)) for norm in comparison.norms}
    channels = {norm: list(comparison.channels_per_group(norm).items()) if values[norm] else [] for norm in values}
    rows = [
        replace(
            row,
            channels_per_group=channels[row.norm],
            curves=curves.get(row.metric, {}).get(row.norm, {}),
            machine="; ".join(machines),
            commit="; ".join(commits),
        )
        for row in summarize(values, paper)
    ]
    write_rows(os.path.join(comparison.output, "results.json"), rows)
    if curves:
        plot_curves(curves, os.path.join(comparison.output, "curves.png"))
    if rows:
        first = [row for row in rows if row.metric == rows[0].metric]
        plot_channels_per_group(first, os.path.join(comparison.output, "channels_per_group.png"))
    text = _report(comparison, rows, machines)
    with atomic_open(os.path.join(comparison.output, "results.md")) as file:
        file.write(text)
    return text


def _report(comparison, rows, machines):
    """The tables in Markdown, with what was run and what did not finish."""
    solver = comparison.cfg.SOLVER
    states = {run: comparison.state(run) for run in comparison.runs}
    unfinished = {run: state for run, state in states.items() if state.status != "finished"}
    parts = [
        f"# {', '.join(comparison.norms)} in {comparison.config_file}",
        f"{len(states) - len(unfinished)} of {len(states)} runs finished: "
        f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, each norm as {', '.join(comparison.keys)}."
        + f" Overrides: {shlex.join(comparison.overrides)}." * bool(comparison.overrides)
        + f" Trained on {'; '.join(machines)}." * bool(machines),
    ]
    if rows:
        parts += [
            table(rows),
            "![loss and metric over the iterations](curves.png)",
            "![metric over the channels in a group](channels_per_group.png)",
        ]
    if unfinished:
        parts.append("\n".join(f"- {run}: {_why(run, state)}" for run, state in unfinished.items()))
    return "\n\n".join(parts) + "\n"


def _why(run, state):
    return f"failed: {state.reason} ({run.path('output.txt')})" if state.status == "failed" else state.status
