"""Plots: curves of several norms and seeds, gradient ratios beside the paper's."""

from typing import Dict, List

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from .gradients import block_kind  # noqa: E402

__all__ = ["plot_channels_per_group", "plot_comparison", "plot_learning_curves", "plot_probe", "plot_sweep"]


def plot_comparison(curves: Dict[str, Dict[str, Dict]], path: str) -> None:
    """A panel for each quantity, over iterations, with a line for each norm: the mean over its seeds in a band
    of one standard deviation on either side.

    Args:
        curves: by quantity ("total_loss", "PQ"), norm and seed the list of (iteration, value).
    """
    figure, panels = plt.subplots(1, len(curves), figsize=(6.5 * len(curves), 4.5), layout="constrained", squeeze=False)
    for axes, (quantity, by_norm) in zip(panels[0], curves.items()):
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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_channels_per_group(rows: List[Dict], path: str) -> None:
    """Which group size does best: for rows of one metric, a point a seed over the channels in a group, a dash at
    their mean, PGN and GN1 in colours of their own.

    Where a norm's layers differ in it (PGN; GN, as layers differ in width), it stands at their geometric mean and a
    line reaches from the lowest to the highest.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = {"PGN": "tab:red", "GN1": "tab:blue"}
    for row in rows:
        values = [value for value in row["values"] if value is not None]
        if not values or not row["channels_per_group"]:
            continue
        channels, layers = np.array(row["channels_per_group"], dtype=float).T
        middle = np.exp2(np.average(np.log2(channels), weights=layers))
        mean = np.mean(values)
        colour = colours.get(row["norm"].removesuffix("+WS"), "0.35")
        axes.plot([channels.min(), channels.max()], [mean, mean], color=colour, lw=0.8, alpha=0.5)
        axes.plot([middle] * len(values), values, "o", color=colour, ms=5, alpha=0.7)
        axes.plot(middle, mean, "_", color=colour, ms=18, mew=2)
        axes.annotate(row["norm"], (middle, max(values)), (0, 7), textcoords="offset points", ha="center", color=colour)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.margins(y=0.15)
    axes.set(xlabel="channels in a group, layers under test", ylabel=rows[0]["metric"])
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _binned(series, bins=100):
    """(mean iteration (n,), values (len(series), n)) in up to ``bins`` stretches of iterations that all series have."""
    points = [np.array(s, dtype=float) for s in series]
    last = max(p[-1, 0] for p in points)
    numbers = [np.minimum(p[:, 0] * bins // (last + 1), bins - 1).astype(int) for p in points]
    common = sorted(set.intersection(*(set(n) for n in numbers)))
    values = [[p[n == b, 1].mean() for b in common] for p, n in zip(points, numbers)]
    iterations = [points[0][numbers[0] == b, 0].mean() for b in common]
    return np.array(iterations), np.array(values)


def plot_sweep(rows: List[Dict], path: str) -> None:
    """For rows of :func:`study.theory.sweep`: Equations B and D over the group size, one panel for each layer."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    titles = {"B": "B: over the norm (Eq. 22)", "D": "D: over the block (K, Eq. 31)"}
    figure, panels = plt.subplots(2, len(layers), figsize=(5 * len(layers), 7.5), layout="constrained")
    for equation, line in zip("BD", panels):
        for layer, axes in zip(layers, line):
            shown = [row for row in rows if row["equation"] == equation and row["layer"] == layer]
            maps = sorted({row["map_size"] for row in shown})
            _plot_sweep_panel(axes, [[row for row in shown if row["map_size"] == size] for size in maps])
            axes.set_title(f"{layer} {shown[0]['n_in']} \u2192 {shown[0]['n_out']}", fontsize=10)
        line[0].set_ylabel(f"gradient ratio {titles[equation]}")
    for axes in panels[-1]:
        axes.set_xlabel("group size, channels")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _plot_sweep_panel(axes, curves):
    axes.set_xscale("log", base=2)
    sizes = [row["group_size"] for row in curves[0]]
    axes.plot(sizes, [row["paper"] for row in curves[0]], color="C3", label="paper")
    if curves[0][0]["exact"] is not None:
        axes.plot(sizes, [row["exact"] for row in curves[0]], "k", label="exact")
    for rows, color in zip(curves, ("C0", "C2", "C1", "C4")):
        size = rows[0]["map_size"]
        axes.errorbar(
            sizes,
            [row["empirical"] for row in rows],
            [1.96 * (row["standard_error"] or 0) for row in rows],
            fmt="o:",
            color=color,
            ms=5,
            mfc="none",
            lw=0.8,
            label="measured" + f", {size}x{size} maps" * (size > 1),
        )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="0.9")
    axes.legend(fontsize=8)


def plot_probe(rows: List[Dict], path: str) -> None:
    """For rows of :func:`study.gradients.probe`: measured ratio and the paper's K along the depth of the
    model, one panel for each setup with groups of its own."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    setups = {}  # by their groups: the configured model may be one of the others
    for setup in dict.fromkeys(row["setup"] for row in rows):
        shown = [row for row in rows if row["setup"] == setup]
        setups.setdefault(tuple((row["name"], row["num_groups"]) for row in shown), {})[setup] = shown
    size = max(8, 0.15 * len(names)), 2.2 * len(setups) + 1.6
    figure, panels = plt.subplots(
        len(setups), 1, sharex=True, sharey=True, figsize=size, squeeze=False, layout="constrained"
    )
    for same, axes in zip(setups.values(), panels[:, 0]):
        shown = next(iter(same.values()))
        paper = [(names.index(row["name"]), row["paper"]) for row in shown if row["paper"]]
        if paper:
            axes.plot(*zip(*paper), "_", color="C3", mew=2, ms=7, label="paper's K")
        for kind, marker in _MARKERS.items():
            rows_of_kind = [row for row in shown if row["measured"] and block_kind(row) == kind]
            points = [(names.index(row["name"]), row["measured"]) for row in rows_of_kind]
            if points:
                axes.plot(*zip(*points), color="C0", ls="", **marker, label=f"measured, {kind}")
        axes.axhline(1, color="0.5", lw=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(f"{', '.join(same)}\ngradient ratio")
    panels[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    axes.set_xticks(range(len(names)), [name.removesuffix(".norm") for name in names], rotation=90, fontsize=6)
    figure.savefig(path, dpi=100)
    plt.close(figure)


_MARKERS = {
    "unit block as the paper has it": {"marker": "o", "ms": 5},
    "shared input": {"marker": "o", "ms": 4, "mfc": "none"},
    "no activation": {"marker": "s", "ms": 4, "mfc": "none"},
    "stride above 1": {"marker": "v", "ms": 4, "mfc": "none"},
}


def plot_learning_curves(rows: List[Dict], practical: int, path: str) -> None:
    """The paper's Figure 2, for rows of :func:`study.mlp.train`: the train loss over the iterations, the mean
    over the seeds, one curve for each number of groups, the ``practical`` one in black."""
    curves = {}
    for row in rows:
        curves.setdefault(row["num_groups"], []).append(row)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colors = plt.get_cmap("viridis_r")(np.linspace(0.05, 1, len(curves)))
    for color, (groups, runs) in zip(colors, sorted(curves.items())):
        style = {"color": "k", "lw": 2, "zorder": 3} if groups == practical else {"color": color, "lw": 1.2}
        loss = np.mean([run["train_loss"] for run in runs], axis=0)
        label = f"G = {groups}" + ", practical" * (groups == practical)
        axes.plot(runs[0]["iteration"], loss, label=label, **style)
    axes.set(xlabel="iteration", ylabel="train loss", yscale="log")
    axes.legend(loc="center right", fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)
