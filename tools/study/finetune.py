"""A network with batch-norm weights is fine-tuned under group norms, whose affine is fresh or calibrated.

The network is MobileNetV2 with ImageNet weights and a new linear head. It is trained for 2 epochs on Caltech-101, with
20 images of each class in batches of 8, and tested on 10 other images of each class. The recipe is SGD with momentum
0.9 and weight decay 1e-4, a linear warm-up over the first 10 % of the steps, a cosine decay to 0, and images that are
mirrored at random. The learning rate is the one at which FrozenBN is best on a split of its own (seed 100). Group norms
are also trained at 3 and 10 times that rate, and the table has the best of the three. BN takes its statistics from 2
images and adds the gradients of 4 such batches. A seed draws the images of both halves and their order.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from command_line import add_outputs, count
from gng_d2.errors import InputError
from gng_d2.job.files import prepare_outputs

from .intervals import mean_with_interval
from .pretrained import add_data, features, load_mobilenet, normalized, right, split
from .retention import IMAGES, replaced
from .rows import add_norms, machine, markdown, rows_to_keep, write_rows

FROZEN, BATCH_NORM = "FrozenBN", "BN"
RATES = (0.0001, 0.0003, 0.001, 0.003)
SEARCH_SEED = 100
MICRO_BATCH = 2  # images from which BN takes its statistics


@dataclass(frozen=True)
class FinetuneRun:
    """The settings of a run."""

    norm: str
    affine: str  # "trained" for batch norms, else "fresh" or "calibrated"
    seed: int
    lr: float
    epochs: int
    batch_size: int
    image_size: int


@dataclass(frozen=True)
class FinetuneRow(FinetuneRun):
    """A run and its results."""

    accuracy: float  # on the test images, in %; 0 if the loss was not finite
    train_loss: float | None  # the mean over the last epoch
    machine: str


def _model(run, reference, images):
    if run.norm not in (FROZEN, BATCH_NORM):
        return replaced(reference, run.norm, run.affine, images[: IMAGES if run.affine == "calibrated" else 1])
    return copy.deepcopy(reference)


def _train_mode(run, model):
    model.train()
    for module in model.modules() if run.norm == FROZEN else ():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def train(run: FinetuneRun, reference: nn.Module, data) -> FinetuneRow:
    """Replace the norms of ``reference`` as ``run`` says, and fine-tune it on ``data``."""
    torch.manual_seed(run.seed)
    draw = np.random.default_rng(run.seed)
    order = draw.permutation(len(data.train))
    model = _model(run, reference, normalized(data.train[order[:IMAGES]]))
    head = nn.Linear(reference.last_channel, int(data.train_labels.max()) + 1)
    nn.init.zeros_(head.weight)
    whole = nn.Sequential(model, head)
    _train_mode(run, whole)
    parameters = [p for p in whole.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, run.lr, 0.9, weight_decay=1e-4)
    steps = run.epochs * len(order) // run.batch_size
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1) * (1 + np.cos(np.pi * step / steps)) / 2
    )
    batches = [b for _ in range(run.epochs) for b in draw.permutation(len(order))][: steps * run.batch_size]
    losses = []
    for batch in np.array(batches).reshape(steps, run.batch_size):
        optimizer.zero_grad()
        losses.append(_step(run, whole, data, batch, draw))
        if not np.isfinite(losses[-1]):
            return _row(run, 0.0, None)
        optimizer.step()
        schedule.step()
    accuracy = right(head, features(model, data.test), data.test_labels)
    return _row(run, accuracy, float(np.mean(losses[-steps // run.epochs :])))


def _step(run, model, data, batch, draw):
    """Add the gradients of a batch and return its loss. For BN the batch is computed in parts of MICRO_BATCH images."""
    total = 0.0
    for part in np.split(batch, len(batch) // MICRO_BATCH) if run.norm == BATCH_NORM else [batch]:
        mirrored = torch.tensor(draw.random(len(part)) < 0.5)[:, None, None, None]
        images = data.train[part]
        images = normalized(torch.where(mirrored, images.flip(3), images))
        loss = F.cross_entropy(model(images), data.train_labels[part]) * len(part) / len(batch)
        loss.backward()
        total += loss.item()
    return total


def _row(run, accuracy, loss):
    return FinetuneRow(**dataclasses.asdict(run), accuracy=accuracy, train_loss=loss, machine=machine())


def _runs(args, seed, rate) -> Iterator[FinetuneRun]:
    rest = {"seed": seed, "epochs": args.epochs, "batch_size": args.batch_size, "image_size": args.image_size}
    yield FinetuneRun(norm=FROZEN, affine="trained", lr=rate, **rest)
    for affine in ("calibrated", "fresh"):
        for factor in (1, 3, 10):
            yield from (FinetuneRun(norm=norm, affine=affine, lr=factor * rate, **rest) for norm in args.norms)
    yield FinetuneRun(norm=BATCH_NORM, affine="trained", lr=rate, **rest)


def _search(args) -> list[FinetuneRun]:
    run = next(_runs(args, SEARCH_SEED, 0.0))
    return [dataclasses.replace(run, lr=rate) for rate in RATES]


def _train_missing(args, runs, reference, rows) -> None:
    """Train those of ``runs``, which have the same seed, that have no row in ``rows``, and add their rows."""
    done = {(row.norm, row.affine, row.seed, row.lr) for row in rows}
    left = [run for run in runs if (run.norm, run.affine, run.seed, run.lr) not in done]
    data = split(args.data, args.image_size, runs[0].seed) if left else None
    for run in tqdm(left, unit="run", desc=f"seed {runs[0].seed}", disable=not left):
        rows.append(train(run, reference, data))
        write_rows(args.json, rows)


def table(rows: list[FinetuneRow]) -> str:
    """A table with a line for each norm and affine, at the learning rate at which it is best."""
    search = [row for row in rows if row.seed == SEARCH_SEED]
    rest = [row for row in rows if row.seed != SEARCH_SEED]
    accuracies: dict[tuple, dict[int, float]] = {}
    for row in rest:
        accuracies.setdefault((row.norm, row.affine, row.lr), {})[row.seed] = row.accuracy
    best: dict[tuple, tuple] = {}
    for norm, affine, lr in accuracies:
        mean = np.mean(list(accuracies[norm, affine, lr].values()))
        best[norm, affine] = max(best.get((norm, affine), (-1, lr)), (mean, lr))
    frozen = {row.seed: row.accuracy for row in rest if row.norm == FROZEN}
    lines = []
    for (norm, affine), (_, lr) in best.items():
        found = accuracies[norm, affine, lr]
        differences = [found[seed] - frozen[seed] for seed in found if seed in frozen]
        difference = "" if norm == FROZEN else mean_with_interval(differences, sign="+")
        lines.append([norm, affine, f"{lr:g}", len(found), mean_with_interval(list(found.values())), difference])
    tried = ", ".join(f"{row.lr:g}: {row.accuracy:.1f}" for row in search)
    return "\n\n".join(
        [
            markdown(lines, ["norm", "affine", "learning rate", "seeds", "% right", "to FrozenBN"]),
            f"Test images of Caltech-101 that are labelled rightly after {rows[0].epochs} epochs, in %, ± the 95 % "
            f"interval of the mean over the seeds. The difference is paired by seed. FrozenBN on the split that fixed "
            f"the learning rate: {tried}." + " A dash is not measured." * any("-" in line for line in lines),
        ]
    )


def add_arguments(parser) -> None:
    add_outputs(parser, json="write a row for each run")
    add_data(parser)
    add_norms(parser, "GN1", "GN/16", "PGN")
    parser.add_argument("--epochs", type=count, default=2, help="default: %(default)s")
    parser.add_argument("--batch-size", type=count, default=8, metavar="IMAGES", help="default: %(default)s")


def main(args) -> None:
    prepare_outputs(args.json)
    if args.batch_size % MICRO_BATCH:
        raise InputError(f"--batch-size {args.batch_size}: it must be a multiple of {MICRO_BATCH}")
    rows = rows_to_keep(args, FinetuneRow, same=["epochs", "batch_size", "image_size"])
    reference = load_mobilenet(args.weights)
    _train_missing(args, _search(args), reference, rows)
    rate = max((row for row in rows if row.seed == SEARCH_SEED), key=lambda row: row.accuracy).lr
    for seed in args.seeds:
        _train_missing(args, list(_runs(args, seed, rate)), reference, rows)
    print(table(rows))
