"""The paper's MLP on MNIST under every number of groups: Section 3.1, Table 3 and Figure 2.

The paper's hyper-parameters are in an appendix that is not at hand. These are common ones, fixed before any
test error was seen: SGD with momentum 0.9, learning rate 0.1 with a cosine decay to 0, weight decay 1e-4,
20 epochs of batches of 128, PyTorch's initialization, pixels normalized by MNIST's mean and deviation, no
augmentation. The test error is that of the last step.
"""

import os
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import MNIST
from tqdm import tqdm

from gng_d2.errors import InputError
from gng_d2.files import machine
from gng_d2.groups import practical_num_groups

from .rows import finish_run, open_run

__all__ = ["PRACTICAL", "load_mnist", "mlp", "settings_of", "train", "train_all"]

IN, HIDDEN, CLASSES = 784, 512, 10
PRACTICAL = practical_num_groups(IN, HIDDEN)
RECIPE = {"batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
CURVE_POINTS = 100


def load_mnist(root: str, train: bool) -> Tuple[Tensor, Tensor]:
    """Normalized images (N, 784) and labels (N,) of ``root``/MNIST, downloaded if they are not there.

    Raises:
        InputError: they are not there and cannot be downloaded, or cannot be read.
    """
    try:
        dataset = MNIST(root, train=train, download=True)
    except Exception as error:  # each way of fetching and reading raises its own
        raise InputError(
            f"--data {root}: MNIST cannot be read in {os.path.join(root, 'MNIST', 'raw')}, nor downloaded: {error}"
        ) from error
    return (dataset.data.flatten(1) / 255 - 0.1307) / 0.3081, dataset.targets


def mlp(num_groups: int) -> nn.Sequential:
    # PyTorch's own GroupNorm: ours refuses the groups of a single number that Table 3's last column has.
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.GroupNorm(num_groups, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def settings_of(num_groups: int, seed: int, epochs: int) -> Dict:
    return {"num_groups": num_groups, "seed": seed, "epochs": epochs, **RECIPE}


def train(
    settings: Dict, train_set: Sequence[Tensor], test_set: Sequence[Tensor], on_epoch: Callable = lambda: None
) -> Dict:
    """One run, from the seed: same initial weights and order of images for every number of groups.

    Returns:
        ``settings`` with ``test_error`` in %, and the learning curve: ``train_loss``, each the mean over the
        iterations since the one before, up to the one in ``iteration``.
    """
    images, labels = train_set
    torch.manual_seed(settings["seed"])
    model = mlp(settings["num_groups"])
    optimizer = torch.optim.SGD(
        model.parameters(), settings["lr"], settings["momentum"], weight_decay=settings["weight_decay"]
    )
    batches_per_epoch = -(-len(images) // settings["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["epochs"] * batches_per_epoch)
    losses = []
    for _ in range(settings["epochs"]):
        for batch in torch.randperm(len(images)).split(settings["batch_size"]):
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
    return {
        **settings,
        "test_error": 100 * wrong.sum().item() / len(wrong),
        "iteration": np.cumsum([len(window) for window in windows]).tolist(),
        "train_loss": [round(float(window.mean()), 6) for window in windows],
    }


def train_all(runs: Sequence[Dict], root: str, output: str, processes: int = 1) -> List[Dict]:
    """The rows of ``runs`` (see :func:`settings_of`): of those that are finished in the folder ``output``, and
    of the others, which are trained, in ``processes`` processes of one thread each.

    A run that was stopped is trained anew, so it ends as if it had not been.
    """
    folders = [os.path.join(output, f"groups{run['num_groups']}-seed{run['seed']}") for run in runs]
    jobs = [(run, folder) for run, folder in zip(runs, folders) if open_run(folder, run) is None]
    if jobs:
        for is_train in (True, False):
            load_mnist(root, is_train)  # here, where an error is one line
        if processes == 1:
            _train_share(0, jobs, root, 1)
        else:
            torch.multiprocessing.spawn(_train_share, (jobs, root, processes), processes, daemon=True)
    return [open_run(folder, run) for run, folder in zip(runs, folders)]


def _train_share(rank, jobs, root, processes):
    torch.set_num_threads(1)
    train_set, test_set = load_mnist(root, True), load_mnist(root, False)
    jobs = jobs[rank::processes]
    total = sum(run["epochs"] for run, _ in jobs)
    with tqdm(total=total, unit="epoch", desc=f"process {rank + 1} of {processes}", position=rank) as bar:
        for run, folder in jobs:
            finish_run(folder, {**train(run, train_set, test_set, bar.update), "machine": machine()})
