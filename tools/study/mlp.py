"""Table 3 and Figure 2 of the paper: an MLP on MNIST under every number of groups.

The MLP is 784-512-10 with group norm and ReLU, and G = 1, 2, ..., 512. The initial weights and the order of the images
depend on the seed and are the same for every G. The command can be stopped at any time; when it is started again, it
trains the runs that are not finished.

The paper's hyper-parameters are in an appendix that is not at hand. These are common ones, fixed before any test error
was seen: SGD with momentum 0.9, learning rate 0.1 with a cosine decay to 0, weight decay 1e-4, 20 epochs of batches of
128, PyTorch's initialization, pixels normalized by MNIST's mean and deviation, and no augmentation. The test error is
the one after the last step.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import MNIST
from tqdm import tqdm

from command_line import add_outputs, count
from gng_d2.errors import InputError
from gng_d2.groups import practical_num_groups
from gng_d2.job.files import prepare_outputs, save_figure

from .paper import TABLE_3
from .rows import add_seeds, finish_run, machine, markdown, mean_and_std, open_run, write_rows

IF_STOPPED = "the same command goes on with the runs that are not finished"

IN, HIDDEN, CLASSES = 784, 512, 10
PRACTICAL = practical_num_groups(IN, HIDDEN)
CURVE_POINTS = 100


@dataclass(frozen=True)
class MLPRun:
    """The settings of a run."""

    num_groups: int
    seed: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float

    @classmethod
    def of(cls, num_groups: int, seed: int, epochs: int) -> "MLPRun":
        """A run with the recipe that all runs have in common."""
        return cls(num_groups, seed, epochs, batch_size=128, lr=0.1, momentum=0.9, weight_decay=1e-4)


@dataclass(frozen=True)
class MLPRow(MLPRun):
    """A run and its results."""

    test_error: float  # in %
    iteration: list[int]  # the points of the learning curve
    train_loss: list[float]  # at each point, the mean of the losses since the point before
    machine: str


def load_mnist(root: str, train: bool) -> tuple[Tensor, Tensor]:
    """Normalized images (N, 784) and labels (N,) of ``root``/MNIST, which is downloaded if it is missing.

    Raises:
        InputError: MNIST cannot be read, or is missing and cannot be downloaded.
    """
    try:
        dataset = MNIST(root, train=train, download=True)
    except Exception as error:  # each way to download and to read has errors of its own
        raise InputError(
            f"--data {root}: MNIST cannot be read in {os.path.join(root, 'MNIST', 'raw')}, nor downloaded: {error}"
        ) from error
    return (dataset.data.flatten(1) / 255 - 0.1307) / 0.3081, dataset.targets


def mlp(num_groups: int) -> nn.Sequential:
    """The model, made of PyTorch's own layers, because our GroupNorm refuses G = 512, where a group is one number."""
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.GroupNorm(num_groups, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def train(
    run: MLPRun, train_set: Sequence[Tensor], test_set: Sequence[Tensor], on_epoch: Callable = lambda: None
) -> MLPRow:
    """Train and test an MLP. Its initial weights and the order of the images depend on the run's seed alone."""
    images, labels = train_set
    torch.manual_seed(run.seed)
    model = mlp(run.num_groups)
    optimizer = torch.optim.SGD(model.parameters(), run.lr, run.momentum, weight_decay=run.weight_decay)
    batches_per_epoch = -(-len(images) // run.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs * batches_per_epoch)
    losses = []
    for _ in range(run.epochs):
        for batch in torch.randperm(len(images)).split(run.batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        on_epoch()
    with torch.no_grad():
        wrong = model(test_set[0]).argmax(1) != test_set[1]
    windows = np.array_split(losses, min(CURVE_POINTS, len(losses)))
    return MLPRow(
        **dataclasses.asdict(run),
        test_error=100 * wrong.sum().item() / len(wrong),
        iteration=np.cumsum([len(window) for window in windows]).tolist(),
        train_loss=[round(float(window.mean()), 6) for window in windows],
        machine=machine(),
    )


def train_all(runs: Sequence[MLPRun], root: str, output: str, processes: int = 1) -> list[MLPRow]:
    """The rows of ``runs``. Those that are not finished in the folder ``output`` are trained first, in ``processes``
    processes of one thread each; one that was stopped is trained from its beginning.
    """
    folders = [os.path.join(output, f"groups{run.num_groups}-seed{run.seed}") for run in runs]
    jobs = [(run, folder) for run, folder in zip(runs, folders) if open_run(folder, run, MLPRow) is None]
    if jobs:
        for is_train in (True, False):
            load_mnist(root, is_train)  # an error in this process is one line
        if processes == 1:
            _train_share(0, jobs, root, 1)
        else:
            torch.multiprocessing.spawn(_train_share, (jobs, root, processes), processes, daemon=True)
    return [open_run(folder, run, MLPRow) for run, folder in zip(runs, folders)]


def _train_share(rank, jobs, root, processes):
    torch.set_num_threads(1)
    train_set, test_set = load_mnist(root, True), load_mnist(root, False)
    jobs = jobs[rank::processes]
    total = sum(run.epochs for run, _ in jobs)
    with tqdm(total=total, unit="epoch", desc=f"process {rank + 1} of {processes}", position=rank) as bar:
        for run, folder in jobs:
            finish_run(folder, train(run, train_set, test_set, bar.update))


def table(rows: list[MLPRow]) -> str:
    lines = []
    for groups in dict.fromkeys(row.num_groups for row in rows):
        of_groups = [row for row in rows if row.num_groups == groups]
        mean, std = mean_and_std([row.test_error for row in of_groups])
        loss, _ = mean_and_std([1000 * row.train_loss[-1] for row in of_groups])
        name = f"{groups}{' (practical)' * (groups == PRACTICAL)}"
        lines.append([name, TABLE_3[groups], mean, std, len(of_groups), loss])
    headers = ["G", "paper, error %", "ours, error %", "standard deviation", "seeds", "last train loss, 1/1000"]
    return markdown(lines, headers)


def plot(rows: list[MLPRow], path: str) -> None:
    """Draw the paper's Figure 2: the mean train loss over the iterations, with a curve for each number of groups. The
    curve of the practical number is black."""
    curves = {}
    for row in rows:
        curves.setdefault(row.num_groups, []).append(row)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis_r"](np.linspace(0.05, 1, len(curves)))
    for color, (groups, runs) in zip(colors, sorted(curves.items())):
        practical = groups == PRACTICAL
        style = {"color": "k", "lw": 2, "zorder": 3} if practical else {"color": color, "lw": 1.2}
        loss = np.mean([run.train_loss for run in runs], axis=0)
        axes.plot(runs[0].iteration, loss, label=f"G = {groups}" + ", practical" * practical, **style)
    axes.set(xlabel="iteration", ylabel="train loss", yscale="log")
    axes.legend(loc="center right", fontsize=8, ncols=2)
    save_figure(figure, path, dpi=120)


def add_arguments(parser) -> None:
    add_outputs(
        parser,
        json="write a row for each run, with its learning curve",
        plot="draw the mean learning curve of each number of groups",
    )
    parser.add_argument(
        "--data",
        default="datasets",
        metavar="ROOT",
        help="folder with MNIST/raw in it; MNIST is downloaded there if it is missing; default: %(default)s",
    )
    parser.add_argument(
        "--groups",
        type=int,
        nargs="+",
        default=list(TABLE_3),
        choices=list(TABLE_3),
        metavar="G",
        help="numbers of groups, powers of 2; default: 1 2 4 ... 512",
    )
    add_seeds(parser)
    parser.add_argument("--epochs", type=count, default=20, help="default: %(default)s")
    parser.add_argument(
        "--processes",
        type=count,
        default=1,
        metavar="N",
        help="train N runs at a time, each on one CPU thread; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        default="output/mlp_mnist",
        metavar="DIR",
        help="folder in which each run gets a folder; default: %(default)s",
    )


def main(args) -> None:
    prepare_outputs(args.json, args.plot)
    runs = [MLPRun.of(groups, seed, args.epochs) for seed in args.seeds for groups in args.groups]
    rows = train_all(runs, args.data, args.output, args.processes)
    write_rows(args.json, rows)
    if args.plot:
        plot(rows, args.plot)
    print(table(rows))
