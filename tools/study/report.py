"""The report of a comparison's finished runs: mean and spread over seeds, paired differences, curves."""

import json
import math
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from gng_d2.errors import InputError
from gng_d2.job.files import atomic_open, prepare_outputs, save_figure
from gng_d2.layers.ws_conv import WS

from .comparison import Comparison, Run, RunState
from .intervals import half_width, number_of_seeds
from .metrics import read_metrics
from .rows import markdown, mean_and_std, norm_in_text, read_rows, write_rows

# our names of the metrics and Detectron2's; all are in percent
METRICS = {
    "PQ": "panoptic_seg/PQ",
    "PQ_th": "panoptic_seg/PQ_th",
    "PQ_st": "panoptic_seg/PQ_st",
    "SQ": "panoptic_seg/SQ",
    "RQ": "panoptic_seg/RQ",
    "AP": "bbox/AP",
    "AP50": "bbox/AP50",
    "AP75": "bbox/AP75",
    "mask AP": "segm/AP",
    "mask AP50": "segm/AP50",
    "mask AP75": "segm/AP75",
    "keypoint AP": "keypoints/AP",
    "mIoU": "sem_seg/mIoU",
    "IoU": "sem_seg/IoU",  # of Cityscapes
    "AR@1000": "box_proposals/AR@1000",
}
LOSS = "total_loss"


def metrics_of(datasets: Sequence[str]) -> dict[str, str]:
    """Our names and Detectron2's of the metrics of an evaluation on ``datasets``. Of several, each metric has the name
    of its dataset."""
    if len(datasets) == 1:
        return METRICS
    return {f"{name} {ours}": f"{name}/{theirs}" for name in datasets for ours, theirs in METRICS.items()}


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One metric under one norm. A number is None where too few seeds were measured for it."""

    norm: str
    metric: str  # one of metrics_of, in percent, or LOSS
    seeds: list[int]
    values: list[float | None]  # one for each seed
    mean: float | None
    std: float | None  # the sample standard deviation, with n - 1
    paper: float | None
    difference: float | None  # the mean over seeds of this norm's value less the first norm's
    difference_error: float | None  # the standard error of the difference
    difference_seeds: int  # how many seeds both norms have
    channels_per_group: list[tuple[int, int]] = ()  # (channels in a group, how many of the layers under test have them)
    curves: dict[int, list[tuple[int, float]]] | None = None  # (iteration, value) by seed, where run_results has them
    machine: str = ""
    commit: str = ""  # of the code that trained the runs
    recipe: str = ""  # Comparison.recipe() of the runs; "" in files that are older than this field


class RunResults(NamedTuple):
    """What the metrics.json of a finished run says."""

    values: dict[str, float | None]  # of metrics_of at the end; None where Detectron2 found no detections to evaluate
    curves: dict[str, list[tuple[int, float]]]  # (iteration, value) of the loss and of the first metric


def run_results(run: Run, max_iter: int, datasets: Sequence[str]) -> RunResults:
    """The results of a finished ``run`` of ``max_iter`` iterations that was evaluated on ``datasets``. The result of a
    run without a metric is its loss, as the mean over the last tenth of the iterations."""
    records, metrics = read_metrics(run.path("metrics.json")), metrics_of(datasets)
    last = {name: value for record in records for name, value in record.items()}
    values = {k: None if math.isnan(last[name]) else last[name] for k, name in metrics.items() if name in last}
    names = {LOSS: LOSS, **{metric: metrics[metric] for metric in list(values)[:1]}}
    # A run that was resumed only for its last evaluation has one iteration more, and may have been evaluated before.
    curves = {k: {min(r["iteration"], max_iter): r[name] for r in records if name in r} for k, name in names.items()}
    losses = [r[LOSS] for r in records if LOSS in r and r["iteration"] >= 0.9 * (max_iter - 1)]
    if losses and not values:
        values = {LOSS: statistics.fmean(losses)}
    return RunResults(values, {quantity: list(points.items()) for quantity, points in curves.items() if points})


def summarize(
    values: dict[str, dict[int, dict[str, float | None]]], paper: dict[str, dict[str, float]]
) -> list[ComparisonRow]:
    """Compare the norms in each metric.

    Args:
        values: by norm, seed and metric. Each norm is compared with the first one, seed by seed.
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


def together(rows: list[ComparisonRow], seeds: Set[int]) -> list[ComparisonRow]:
    """The rows of several comparisons as rows of a single one, of ``seeds`` alone. Its baseline is the norm of the
    first row."""
    values = {}
    for row in rows:
        of_norm = values.setdefault(row.norm, {})
        for seed, value in zip(row.seeds, row.values):
            if seed in seeds:
                of_norm.setdefault(seed, {})[row.metric] = value
    return summarize(values, {})


def table(rows: list[ComparisonRow]) -> str:
    """Two tables in Markdown with a column for each metric, and how to read them: the mean of each norm, with the
    paper's value below it, and the difference of each norm to the first one."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    by_norm = {}
    for row in rows:
        by_norm.setdefault(norm_in_text(row.norm), []).append(row)
    baseline, first = next(iter(by_norm.items()))
    results, differences = [], []
    for norm, line in by_norm.items():
        spreads = ["" if row.std is None else f" ± {row.std:.2f}" for row in line]
        cells = [_cell(row.mean, spread) for row, spread in zip(line, spreads)]
        results.append([norm, max(len(row.seeds) for row in line), *cells])
        if any(row.paper for row in line):
            results.append([f"{norm} in the paper", "", *(_cell(row.paper) for row in line)])
    for norm in list(by_norm)[1:]:
        line, name = by_norm[norm], f"{norm} - {baseline}"
        spreads = [
            ""
            if interval is None
            else "({:+.2f} to {:+.2f})".format(*interval) + " *" * (interval[0] * interval[1] > 0)
            for interval in map(difference_interval, line)
        ]
        cells = [_cell(row.difference, spread and f" {spread}", "+") for row, spread in zip(line, spreads)]
        differences.append([name, max(row.difference_seeds for row in line), *cells])
        pairs = [(row.paper, other.paper) for row, other in zip(line, first)]
        if any(all(pair) for pair in pairs):
            cells = [_cell(here - there if here and there else None, sign="+") for here, there in pairs]
            differences.append([f"{name} in the paper", "", *cells])
    parts = [
        markdown(results, ["norm", "seeds", *metrics]),
        "Mean ± standard deviation over seeds, after the last iteration."
        + " total_loss: mean over the last tenth of the iterations." * (rows[0].metric == LOSS)
        + " A dash: not measured, or the models of some seeds detect nothing."
        * any("-" in line for line in [*results, *differences]),
    ]
    most = max(row.difference_seeds for row in rows)
    if most:
        parts.append(markdown(differences, ["difference", "seeds", *metrics]))
        count = sum(difference_interval(row) is not None for row in rows)
        if most == 1:
            parts.append(_NO_INTERVAL)
        elif count:
            parts.append(_INTERVALS.format(f"{count} comparison{'s were' if count > 1 else ' was'}"))
    return "\n\n".join(parts)


_NO_INTERVAL = "These are differences of a single seed. They have no interval, so no conclusion follows from them."
_INTERVALS = (
    "Mean over seeds of the difference, with its 95 % interval (Student's t). A `*` marks an interval that does not "
    "contain 0; a difference without it is within seed noise. {} made here, and of twenty differences that are mere "
    "noise, one gets a `*`."
)


def _cell(value, spread="", sign=""):
    return "-" if value is None else f"{value:{sign}.2f}{spread}"


def difference_interval(row: ComparisonRow) -> tuple[float, float] | None:
    """The 95 % interval of a row's difference, by Student's t. None if there is a single seed."""
    if row.difference_error is None:
        return None
    half = half_width(row.difference_error, row.difference_seeds)
    return row.difference - half, row.difference + half


def plot_curves(curves: dict[str, dict[str, dict]], path: str) -> None:
    """Draw a panel for each quantity over the iterations. A norm's line is the mean over its seeds, in a band of one
    standard deviation on either side.

    Args:
        curves: by quantity ("total_loss", "PQ"), norm and seed the list of (iteration, value).
    """
    figure = Figure(figsize=(6.5 * len(curves), 4.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (quantity, by_norm) in zip(panels, curves.items()):
        for norm, by_seed in by_norm.items():
            # the mean in each of up to 100 stretches of iterations, where all seeds have a value in it
            series = [np.array(points, dtype=float) for points in by_seed.values()]
            last = max(points[-1, 0] for points in series)
            stretches = [(points[:, 0] * 100 // (last + 1)).astype(int) for points in series]
            common = sorted(set.intersection(*map(set, stretches)))
            means = [[p[s == number].mean(axis=0) for number in common] for p, s in zip(series, stretches)]
            iterations, values = np.array(means[0])[:, 0], np.array(means)[:, :, 1]
            mean = values.mean(axis=0)
            marker = "o" if len(iterations) < 20 else ""
            label = f"{norm_in_text(norm)}, {number_of_seeds(len(values))}"
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
    """Draw one metric over the channels in a group: a point for each seed and a dash at the mean of a norm. PGN and GN1
    have colours of their own.

    Where the layers of a norm have different numbers of channels in a group (PGN; GN, if layers differ in width), the
    norm stands at their geometric mean, and a line reaches from the lowest to the highest.
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


def write_report(comparison: Comparison, failed: Mapping[Run, RunState] | None = None) -> str:
    """Write results.json, results.md, curves.png and channels_per_group.png of the finished runs into the
    comparison's folder, and return the text of results.md.

    Args:
        failed: the runs that failed. The folder of a run that could not start says nothing of it.
    """
    states = {run: comparison.state(run) for run in comparison.runs} | dict(failed or {})
    finished = [run for run, state in states.items() if state.status == "finished"]
    machines, commits = (
        "; ".join(sorted({word for run in finished for word in (getattr(states[run], of) or "unknown").split("; ")}))
        for of in ("machine", "commit")
    )
    values, curves = {norm: {} for norm in comparison.norms}, {}
    for run in finished:
        cfg = comparison.cfg
        values[run.norm][run.seed], of_run = run_results(run, cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST)
        for quantity, points in of_run.items():
            curves.setdefault(quantity, {}).setdefault(run.norm, {})[run.seed] = points
    rows = [
        replace(
            row,
            channels_per_group=comparison.facts[row.norm].channels_per_group if row.seeds else [],
            curves=curves.get(row.metric, {}).get(row.norm, {}),
            machine=machines,
            commit=commits,
            recipe=comparison.recipe(),
        )
        for row in summarize(values, {norm: facts.paper for norm, facts in comparison.facts.items()})
    ]
    write_rows(os.path.join(comparison.output, "results.json"), rows)
    if curves:
        plot_curves(curves, os.path.join(comparison.output, "curves.png"))
    if rows:
        first = [row for row in rows if row.metric == rows[0].metric]
        plot_channels_per_group(first, os.path.join(comparison.output, "channels_per_group.png"))
    text = _text(comparison, states, rows, machines)
    with atomic_open(os.path.join(comparison.output, "results.md")) as file:
        file.write(text)
    return text


def restore_runs(comparison: Comparison, path: str) -> None:
    """Write into the comparison's folder, as finished runs, those of its runs that have results in ``path``.

    So a comparison continues on another machine from its results.json alone. Restored runs have the metrics and the
    curves that the file has, and no weights.

    Raises:
        InputError: the file is damaged, or its results are of another comparison.
    """
    rows, recipe = read_rows(path, ComparisonRow), comparison.recipe()
    metrics = metrics_of(comparison.cfg.DATASETS.TEST)
    others = {row.recipe or "unknown" for row in rows} - {recipe}
    if others:
        raise InputError(
            f"--finished: {path} holds results of another comparison, which must not mix with these: its config or its "
            f"number of processes differs, or an older version wrote it (recipe {', '.join(sorted(others))}; here it "
            f"is {recipe})"
        )
    for run in comparison.runs:
        of_run = [row for row in rows if row.norm == run.norm and run.seed in row.seeds]
        if not of_run or comparison.state(run).status == "finished":
            continue
        records = {comparison.last_iteration: {"iteration": comparison.last_iteration}}
        for row in of_run:
            name, value = metrics.get(row.metric, row.metric), row.values[row.seeds.index(run.seed)]
            points = (row.curves or {}).get(str(run.seed), [])
            if name != LOSS:
                points = [*points, (comparison.last_iteration, math.nan if value is None else value)]
            for iteration, at in points:
                records.setdefault(iteration, {"iteration": iteration})[name] = at
        prepare_outputs(run.path("metrics.json"))
        with atomic_open(run.path("metrics.json")) as file:
            file.writelines(json.dumps(records[iteration]) + "\n" for iteration in sorted(records))
        run.record(RunState("finished", machine=of_run[0].machine, commit=of_run[0].commit))


def _text(comparison, states, rows, machines):
    """The report in Markdown: what was run, the tables, the runs that did not finish, and those that were not asked
    for."""
    unfinished = {run: state for run, state in states.items() if state.status != "finished"}
    solver = comparison.cfg.SOLVER
    parts = [
        f"# {', '.join(map(norm_in_text, comparison.norms))} in {comparison.config_file}",
        f"{len(states) - len(unfinished)} of {len(states)} runs finished: "
        f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, {_varied(comparison)}."
        + f" Options: {shlex.join([*comparison.options(), *comparison.overrides])}."
        + f" Trained on {machines}." * bool(machines),
    ]
    if rows:
        parts += [
            table(rows),
            "![loss and metric over the iterations](curves.png)",
            "![metric over the channels in a group](channels_per_group.png)",
        ]
        if rows[0].metric == LOSS and comparison.cfg.DATASETS.TEST:
            parts.append("The losses are compared, because the evaluation has none of the metrics that are known here.")
    lines = [f"- {run}: {state}{run.log_hint(state)}" for run, state in unfinished.items()]
    parts += ["\n".join(lines)] * bool(lines)
    others = comparison.other_runs()
    parts += [f"Not in this report, because they were not asked for: {', '.join(others)}."] * bool(others)
    return "\n\n".join(parts) + "\n"


def _varied(comparison):
    """Which keys take the norms, and where weight standardization comes with them."""
    text = f"each norm as {', '.join(comparison.keys)}"
    if not comparison.standardized:
        return text
    without = [norm for norm in comparison.norms if not any(WS in word for word in comparison.norm_overrides(norm))]
    return (
        f"{text}, {WS} added in {', '.join(sorted(comparison.standardized))}"
        + f", but {', '.join(map(norm_in_text, without))} without it" * bool(without)
    )
