"""What trained norms receive and lose: constant channels, and what distinguishes one image from another.

    tools/reproduce.py collapse --import configs/study/bccd_camvid.py --runs output/camvid --json OUT --plot OUT.png

Each finished run in the folders of tools/compare.py sees test images once. Two shares are measured at each norm that
normalizes every image by itself:

constant  the share of the power of its input that is the same for all images and positions of a channel. If it is
          large, the layer before the norm says little of what it sees
lost      the share of the variance of a channel's mean from image to image that goes when the norm subtracts the mean
          of the channel's group. A norm with 1 channel in a group loses all of it

The rows of LGN, which learns its mixtures, have these mixtures too.
"""

import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from command_line import add_import, add_outputs, add_trust
from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_config
from gng_d2.job.data.checks import prepare_datasets
from gng_d2.job.engine import Trainer
from gng_d2.job.files import prepare_outputs, save_figure
from gng_d2.job.imports import import_modules
from gng_d2.job.norm_keys import norms_of_key
from gng_d2.layers import LearnedGroupNorm

from .comparison import finished_runs
from .rows import leaves, machine, markdown, mean_and_std, norm_in_text, write_rows


@dataclass(frozen=True)
class CollapseRow:
    """A norm of a trained model."""

    run: str  # the norm with which the run was trained
    seed: int
    name: str  # the norm's path in the model
    under_test: bool  # whether the norm is one that the comparison varies
    constant: float
    lost: float | None  # None if all images have the same means
    images: int
    machine: str
    mixtures: list[tuple[int, float, float]] | None = None  # (channels in a group, weight in the mean, in the variance)


class Collapse:
    """Sums over the inputs that a group norm has received, and the two shares that follow from them."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.numbers, self.total, self.squares = 0, 0, 0
        self.means = []

    def add(self, x: Tensor) -> None:
        """Add an input of the norm, (N, C, *)."""
        x = x.detach().flatten(2).double()
        self.numbers += x.shape[0] * x.shape[2]
        self.total = self.total + x.sum((0, 2))
        self.squares = self.squares + x.square().sum()
        self.means.append(x.mean(2))

    def constant(self) -> float:
        return (self.total.square().sum() / self.numbers / self.squares).item()

    def lost(self) -> float | None:
        means = torch.cat(self.means)
        own, kept = (t - t.mean(0) for t in (means, means - self._subtracted(means)))
        power = own.square().sum()
        return 1 - (kept.square().sum() / power).item() if power > 0 else None

    def _subtracted(self, means):
        """What the norm subtracts from each channel, (N, C), if the channels have these ``means``."""
        norm = self.norm
        if isinstance(norm, LearnedGroupNorm):
            mixture = norm.mixtures()["mean"]
        else:
            mixture = {norm.num_channels // norm.num_groups: 1}
        groups = [(weight, means.unflatten(1, (-1, size))) for size, weight in mixture.items()]
        return sum(weight * of.mean(2, keepdim=True).expand_as(of).flatten(1) for weight, of in groups)


def measure(model: nn.Module, batches: Iterable) -> dict[str, Collapse]:
    """Run ``model`` on ``batches``, and return what each norm that it reaches has received, by the norm's path."""
    norms = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.GroupNorm))
    found = {name: Collapse(norm) for name, norm in norms}
    hooks = [c.norm.register_forward_pre_hook(lambda _, args, c=c: c.add(args[0])) for c in found.values()]
    training = model.training
    try:
        with torch.no_grad():
            for batch in batches:
                model.eval()(batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: c for name, c in found.items() if c.numbers}


def runs_with_weights(folder: str) -> list[tuple[str, str, set[str]]]:
    """The paths of config and weights of each finished run of a comparison, with the keys that the comparison varies.

    Raises:
        InputError: tools/compare.py did not make the folder, or no run in it is finished.
    """
    try:
        with open(os.path.join(folder, "comparison.yaml"), encoding="utf-8") as file:
            config = yaml.safe_load(file)["config"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"--runs: {folder} is no folder of tools/compare.py: {error}") from error
    keys = {key for key, value in leaves(config) if str(value).startswith("<norm>")}
    runs = [run for run in finished_runs(folder) if os.path.isfile(_weights(run))]
    if not runs:
        raise InputError(f"--runs: no run in {folder} is finished")
    return [(run.path("config.yaml"), _weights(run), keys) for run in runs]


def _weights(run):
    return run.path("model_final.pth")


def measure_run(config: str, weights: str, keys: set[str], images: int) -> list[CollapseRow]:
    """The norms of a finished run, on the first ``images`` of its test images."""
    cfg = load_config(config)
    if not cfg.DATASETS.TEST:
        raise InputError(f"{config}: DATASETS.TEST is empty, so there are no images to measure the run on")
    prepare_datasets(cfg, eval_only=True)
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(weights)
    loader = Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    batches = [batch for batch, _ in zip(loader, range(images))]
    on_meta = build_on_meta(cfg)
    under_test = {path for key in keys for path in norms_of_key(cfg, key, on_meta)[1]}
    norm, seed = _norm_and_seed(cfg, keys)
    return [
        CollapseRow(
            run=norm,
            seed=seed,
            name=name,
            under_test=name in under_test,
            constant=found.constant(),
            lost=found.lost(),
            images=len(batches),
            machine=machine(cfg.MODEL.DEVICE),
            mixtures=_mixtures(found.norm),
        )
        for name, found in measure(model, batches).items()
    ]


def _norm_and_seed(cfg, keys):
    return ", ".join(sorted({norm_in_text(value) for key, value in leaves(cfg) if key in keys})), cfg.SEED


def _mixtures(norm):
    if not isinstance(norm, LearnedGroupNorm) or not norm.logits.requires_grad:
        return None
    mean, variance = norm.mixtures().values()
    return [(size, mean[size], variance[size]) for size in mean]


def _by_run(rows):
    """The norms under test by the run's norm and seed."""
    by_run = {}
    for row in rows:
        if row.under_test:
            by_run.setdefault(row.run, {}).setdefault(row.seed, []).append(row)
    return by_run


def _mean(rows, share):
    return statistics.fmean(getattr(row, share) for row in rows if getattr(row, share) is not None)


def table(rows: list[CollapseRow]) -> str:
    """Both shares under each norm: the mean over the norms under test, then over the seeds with its deviation."""
    lines = []
    for run, by_seed in _by_run(rows).items():
        shares = [mean_and_std([_mean(norms, share) for norms in by_seed.values()]) for share in ("constant", "lost")]
        cells = [f"{mean:.3f}" + (f" ± {std:.3f}" if std is not None else "") for mean, std in shares]
        lines.append([run, len(by_seed), len(next(iter(by_seed.values()))), *cells])
    return markdown(lines, ["norm", "seeds", "norms", "constant power", "lost of images' own means"])


def mixture_table(rows: list[CollapseRow]) -> str:
    """Over how many channels each learned mixture takes mean and variance: the geometric mean of the group sizes by
    their weights, and in brackets the weights of single channels and of all channels; each is the mean over seeds."""
    learned = {}
    for row in rows:
        if row.under_test and row.mixtures:
            learned.setdefault((row.run, row.name), []).append(np.array(row.mixtures))
    lines = []
    for (run, name), seeds in learned.items():
        channels, *weights = np.mean(seeds, axis=0).T
        cells = [f"{np.exp2(w @ np.log2(channels)):.1f} ({w[0]:.2f}, {w[-1]:.2f})" for w in weights]
        lines.append([run, name.removesuffix(".norm"), len(seeds), *cells])
    return markdown(lines, ["norm", "in the model", "seeds", "channels for the mean", "for the variance"])


def plot(rows: list[CollapseRow], path: str) -> None:
    """Draw both shares along the norms under test. Each line is a norm's mean over its seeds."""
    names = list(dict.fromkeys(row.name for row in rows if row.under_test))
    figure = Figure(figsize=(max(9, 0.2 * len(names)), 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, share in zip(panels, ("constant", "lost")):
        for run, by_seed in _by_run(rows).items():
            of_name = {name: [r for norms in by_seed.values() for r in norms if r.name == name] for name in names}
            axes.plot([_mean(of_name[name], share) for name in names], "o-", ms=4, lw=1.2, label=run)
        axes.set_xticks(range(len(names)), [name.removesuffix(".norm") for name in names], rotation=90, fontsize=6)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="share", title="power that is constant", ylim=(-0.02, 1.02))
    panels[1].set(title="images' own channel means that are lost")
    panels[0].legend(fontsize=8)
    save_figure(figure, path, dpi=120)


def add_arguments(parser) -> None:
    parser.add_argument(
        "--runs", required=True, nargs="+", metavar="DIR", help="one or more folders that tools/compare.py made"
    )
    add_outputs(parser, json="write a row for each run and norm", plot="draw both shares along the norms under test")
    parser.add_argument(
        "--images", type=int, default=32, metavar="N", help="number of test images; default: %(default)s"
    )
    add_import(parser)
    add_trust(parser)


def main(args) -> None:
    if args.images < 2:
        raise InputError(f"--images {args.images}: images are compared, so there must be two or more")
    import_modules(args.imports)
    prepare_outputs(args.json, args.plot)
    runs = [run for folder in args.runs for run in runs_with_weights(folder)]
    known = {}
    for config, weights, keys in runs:
        other = known.setdefault(_norm_and_seed(load_config(config), keys), weights)
        if other != weights:
            raise InputError(f"--runs: {other} and {weights} have the same norms and the same seed. Measure them apart")
    rows = [row for run in tqdm(runs, unit="run") for row in measure_run(*run, args.images)]
    write_rows(args.json, rows)
    if args.plot:
        plot(rows, args.plot)
    print(table(rows))
    if any(row.mixtures for row in rows):
        print(f"\n{mixture_table(rows)}")
