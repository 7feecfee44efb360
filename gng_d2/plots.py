"""Plots: a model's groups along its depth, loss curves."""

import json
from typing import Dict, List

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import matplotlib.ticker  # noqa: E402

from .groups import isometry_ratio, practical_num_groups  # noqa: E402

__all__ = ["plot_groups", "plot_losses", "plot_learning_curves"]


def plot_groups(rows: List[Dict], path: str) -> None:
    """Two panels along the depth of a model, for rows of :func:`gng_d2.analysis.norm_table`: its group
    counts beside its channels, and K as it would be under GN (32 groups), GN1 and PGN."""
    rows = [row for row in rows if row["n_in"] is not None]
    depth = range(len(rows))
    figure, (groups, ratio) = plt.subplots(
        2, 1, sharex=True, figsize=(max(8, 0.16 * len(rows)), 8), layout="constrained"
    )
    groups.step(depth, [row["n_out"] for row in rows], where="mid", color="0.8", label="output channels")
    norms = sorted({row["norm"] for row in rows})
    for norm in norms:
        at = [i for i in depth if rows[i]["norm"] == norm and rows[i]["num_groups"]]
        if at:
            groups.plot(at, [rows[i]["num_groups"] for i in at], "o", ms=4, label=f"groups, {norm}")
    groups.set_yscale("log", base=2)
    groups.set_ylabel("number of groups")
    groups.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8)
    without = [norm for norm in norms if not any(r["num_groups"] for r in rows if r["norm"] == norm)]
    if without:
        groups.set_title(f"no groups: {', '.join(without)}", fontsize=9, loc="right")

    choices = {
        "GN": lambda n_in, n_out: 32 if n_out % 32 == 0 else None,
        "GN1": lambda n_in, n_out: 1,
        "PGN": practical_num_groups,
    }
    for (name, choose), marker, fill in zip(choices.items(), "s^o", ("C0", "C1", "none")):
        points = [(i, choose(row["n_in"], row["n_out"])) for i, row in enumerate(rows)]
        points = [(i, isometry_ratio(rows[i]["n_in"], rows[i]["n_out"], g)) for i, g in points if g]
        ratio.plot(*zip(*points), marker, ms=7 if fill == "none" else 4, mfc=fill, label=name)
    ratio.axhline(1, color="0.5", lw=0.8)
    ratio.set_yscale("log", base=2)
    ratio.set_ylabel("K, the paper's gradient ratio\n(1 is isometric)")
    ratio.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    for axes in (groups, ratio):
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    ratio.set_xticks(depth, [row["name"].removesuffix(".norm") for row in rows], rotation=90, fontsize=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_losses(metrics_json: str, path: str) -> None:
    """The loss curves of a run, from the metrics.json that Detectron2 writes."""
    records = []
    with open(metrics_json) as file:
        for record in map(json.loads, file):
            while records and records[-1]["iteration"] >= record["iteration"]:
                records.pop()  # of a run before, in the same folder
            if "total_loss" in record:
                records.append(record)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key in sorted({k for r in records for k in r if k.startswith("loss_")}, key=lambda k: -records[0].get(k, 0)):
        axes.plot([r["iteration"] for r in records if key in r], [r[key] for r in records if key in r], lw=1, label=key)
    axes.plot([r["iteration"] for r in records], [r["total_loss"] for r in records], "k", lw=1.6, label="total_loss")
    axes.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_learning_curves(rows: List[Dict], practical: int, path: str) -> None:
    """The paper's Figure 2, for rows of :func:`gng_d2.mlp.train`: the train loss over the iterations, the mean
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
