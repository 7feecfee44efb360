"""Table 4 of the paper: Detectron2's ResNet-50 and -101 as image classifiers under GN, GN1 and PGN.

The initial weights, the order of the images and their augmentation depend on the seed and are the same for every norm.
On a GPU the training is in mixed precision. The command can be stopped at any time, and stops by itself after
--minutes; when it is started again, it continues.

The paper's hyper-parameters are in an appendix that is not at hand. These are common ones for training from scratch:
SGD with momentum 0.9, learning rate 0.005 with a linear warmup over the first 5 % of the steps and a cosine decay to 0,
weight decay 1e-4 except on norms, and 100 epochs of batches of 64. Images have 128 x 128 pixels: in training a random
crop of 8 to 100 % of the image with a random flip, in the test the central 7/8. The test error is the one after the
last step. A random 80 % of each class, the same for every run, are for training; Oxford-IIIT Pet has a split of its
own. The learning rate was chosen by the train loss of R-50 with GN alone: in 60 steps of 16 images of 64 pixels of
Caltech-101, the loss rose from 5 to 35 at a rate of 0.025, and to 8 at 0.005.
"""

import dataclasses
import itertools
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import AMPTrainer, SimpleTrainer, hooks
from detectron2.layers import get_norm
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder, OxfordIIITPet
from tqdm import tqdm

from command_line import add_outputs, count
from gng_d2.errors import InputError
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.data.loader import PlaceSampler, SeededDataset, seed_everything
from gng_d2.job.files import prepare_outputs

from .paper import TABLE_4
from .rows import (
    add_norms,
    add_seeds,
    finish_run,
    machine,
    markdown,
    mean_and_std,
    norm_in_path,
    open_run,
    write_rows,
)

IF_STOPPED = "the same command goes on where it was"

PET = "oxford-iiit-pet"


@dataclass(frozen=True)
class ClassifierRun:
    """The settings of a run."""

    norm: str
    seed: int
    dataset: str
    classes: int
    train_images: int
    test_images: int
    depth: int
    weights: str  # the name of the file of initial weights, "" for training from scratch
    epochs: int
    image_size: int  # pixels
    batch_size: int
    lr: float
    amp: bool  # whether it is trained in mixed precision

    @property
    def iterations(self) -> int:
        return max(self.epochs * self.train_images // self.batch_size, 1)


@dataclass(frozen=True)
class ClassifierRow(ClassifierRun):
    """A run and its result."""

    error: float  # on the test images, in %
    machine: str


@dataclass(frozen=True)
class ImageSet:
    """Pairs of a PIL image and its label."""

    train: Dataset
    test: Dataset
    classes: list[str]


def load_images(dataset: str, root: str, num_classes: int | None = None) -> ImageSet:
    """Oxford-IIIT Pet, which is downloaded to ``root`` if it is missing, or the folders of classes in ``root``.

    Args:
        num_classes: how many of the folders to take, those with the fewest images first; by default all.

    Raises:
        InputError: the images are missing and cannot be downloaded, or are too few.
    """
    try:
        if dataset == PET:
            splits = [OxfordIIITPet(root, split, download=True) for split in ("trainval", "test")]
            return ImageSet(*splits, splits[0].classes)
        return _split(ImageFolder(root), num_classes)
    except Exception as error:  # each way to download and to read has errors of its own
        raise InputError(f"--data {root}: no images of {dataset}: {error}") from error


def _split(images, num_classes):
    labels = np.array(images.targets)
    smallest = np.sort(np.argsort(np.bincount(labels), kind="stable")[:num_classes])
    images.target_transform = {int(label): i for i, label in enumerate(smallest)}.get
    draw = np.random.default_rng(0)
    train, test = [], []
    for label in smallest:
        shuffled = draw.permutation(np.flatnonzero(labels == label))
        cut = round(0.8 * len(shuffled))
        train.extend(shuffled[:cut].tolist())
        test.extend(shuffled[cut:].tolist())
    if not (train and test):
        raise InputError("too few to train and test with")
    return ImageSet(Subset(images, train), Subset(images, test), [images.classes[label] for label in smallest])


class Classifier(nn.Module):
    """Detectron2's ResNet with a linear layer on its averaged features, as a model for Detectron2's trainers.

    Shape:
        - Input: images (N, 3, H, W), normalized by ImageNet's RGB means and deviations, and labels (N,).
        - Output: the losses by name in training, otherwise logits (N, num_classes).
    """

    def __init__(self, depth: int, norm: str, num_classes: int):
        super().__init__()
        stages = ResNet.make_default_stages(depth, norm=norm, stride_in_1x1=False)
        self.resnet = ResNet(BasicStem(norm=norm), stages, num_classes)

    def forward(self, batch):
        device = self.resnet.linear.weight.device
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        logits = self.resnet(images)["linear"]
        return {"loss_cls": F.cross_entropy(logits, labels)} if self.training else logits


class _Transformed(Dataset):
    def __init__(self, images: Dataset, transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return self.transform(image.convert("RGB")), label


def _transforms(size):
    to_input = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    train = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    test = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
    return transforms.Compose(train + to_input), transforms.Compose(test + to_input)


def _solver(run):
    """A Detectron2 config with the run's schedule, and with Detectron2's defaults for momentum and weight decay."""
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = run.lr
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.MAX_ITER = run.iterations
    cfg.SOLVER.WARMUP_ITERS = cfg.SOLVER.MAX_ITER // 20
    return cfg


def train(
    run: ClassifierRun,
    images: ImageSet,
    folder: str,
    *,
    weights: str = "",
    device: str = "cpu",
    workers: int = 0,
    on_step: Callable = lambda done: None,
    until: float = math.inf,
) -> float | None:
    """Train one classifier and return its test error in %, or None if it was stopped at ``until``.

    The initial weights, the order of the images and their augmentation depend on the seed and the step alone. If
    ``folder`` has a checkpoint of this run, training continues from it, on a CPU with the same number of threads bit by
    bit as if it had not been stopped.

    Args:
        weights: a .pkl file of ``tools/convert_weights.py`` to start from.
        workers: the number of processes that load images.
        on_step: is called with the number of steps since the last call.
        until: a value of :func:`time.monotonic` at which a checkpoint is written and training stops.

    Raises:
        InputError: ``weights`` cannot be read or do not fit the ResNet.
        FloatingPointError: the loss is not finite.
    """
    os.makedirs(folder, exist_ok=True)
    seed_everything(run.seed)
    model = Classifier(run.depth, run.norm, len(images.classes)).to(device)
    cfg = _solver(run)
    optimizer = build_optimizer(cfg, model)
    train_transform, test_transform = _transforms(run.image_size)

    def batches():  # they begin at the step at which the trainer asks for the first one
        dataset = _Transformed(images.train, train_transform)
        start = trainer.iter * run.batch_size
        yield from DataLoader(
            SeededDataset(list(range(len(dataset))), dataset.__getitem__, run.seed),
            sampler=PlaceSampler(
                TrainingSampler(len(dataset), seed=run.seed),
                lambda places: itertools.islice(places, start, None),
            ),
            batch_size=run.batch_size,
            num_workers=workers,
        )

    def stop_in_time(trainer):
        if time.monotonic() > until and trainer.iter + 1 < trainer.max_iter:
            earlier = checkpointer.get_all_checkpoint_files()
            checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            for path in set(earlier) - {checkpointer.get_checkpoint_file()}:
                os.remove(path)
            raise _TimeIsOver

    data = batches()
    trainer = (AMPTrainer if run.amp else SimpleTrainer)(model, data, optimizer)
    checkpointer = Checkpointer(model, folder, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
            hooks.PeriodicCheckpointer(checkpointer, -(-cfg.SOLVER.MAX_ITER // 10), max_to_keep=1),
            hooks.CallbackHook(after_step=lambda _: on_step(1)),
            hooks.CallbackHook(after_step=stop_in_time),
        ]
    )
    resumed = checkpointer.has_checkpoint()
    if weights and not resumed:
        _check_weights(model, checkpointer, weights)
    checkpointer.resume_or_load(weights)
    start = trainer.iter + 1 if resumed else 0
    on_step(start)
    try:
        trainer.train(start, cfg.SOLVER.MAX_ITER)
    except _TimeIsOver:
        return None
    finally:
        data.close()
    test = _Transformed(images.test, test_transform)
    return _test_error(model, DataLoader(test, run.batch_size, num_workers=workers))


class _TimeIsOver(Exception):
    pass


def _check_weights(model, checkpointer, weights):
    """Refuse missing weights, for which Detectron2's checkpointer only has a warning."""
    found = checkpointer.read(weights)["model"]
    wanted = {k: v.shape for k, v in model.resnet.state_dict().items() if not k.startswith("linear.")}
    wrong = [name for name, shape in wanted.items() if name not in found or tuple(found[name].shape) != shape]
    if wrong:
        raise InputError(
            f"--weights {weights}: {len(wrong)} of the {len(wanted)} weights that this ResNet needs are missing or of "
            f"another shape, for instance {wrong[0]}. tools/convert_weights.py makes such files"
        )


@torch.no_grad()
def _test_error(model, batches):
    model.eval()
    wrong = torch.cat([model(batch).argmax(1).cpu() != batch[1] for batch in batches])
    return 100 * wrong.sum().item() / len(wrong)


def train_all(
    runs: list[ClassifierRun], images: ImageSet, output: str, weights: str, workers: int, until: float = math.inf
) -> list[ClassifierRow]:
    """The rows of ``runs``. Those that are not finished in the folder ``output`` are trained first.

    Args:
        until: as :func:`train` takes it. Runs that are not finished by then have no row.

    Raises:
        InputError, FloatingPointError: as :func:`train` does.
    """
    device = "cuda" if runs[0].amp else "cpu"
    names = [f"{run.dataset}-R{run.depth}-{norm_in_path(run.norm)}-seed{run.seed}" for run in runs]
    folders = [os.path.join(output, name) for name in names]
    logging.getLogger(
        "detectron2.engine.train_loop"
    ).disabled = True  # it prints tracebacks of errors that reach the user anyway
    jobs = [(run, folder) for run, folder in zip(runs, folders) if open_run(folder, run, ClassifierRow) is None]
    with tqdm(total=sum(run.iterations for run, _ in jobs), unit="step", disable=not jobs) as bar:
        for run, folder in jobs:
            bar.set_description(f"{run.norm}, seed {run.seed}")
            options = {"weights": weights, "device": device, "workers": workers, "on_step": bar.update, "until": until}
            error = train(run, images, folder, **options)
            if error is None:
                break
            finish_run(folder, ClassifierRow(**dataclasses.asdict(run), error=error, machine=machine(device)))
    rows = [open_run(folder, run, ClassifierRow) for run, folder in zip(runs, folders)]
    return [row for row in rows if row is not None]


def table(rows: list[ClassifierRow], all_classes: bool = True) -> str:
    """A table with a line for each norm. The paper's error stands beside ours if all classes were trained."""
    first = rows[0]
    paper = TABLE_4.get((first.dataset, first.depth), {}) if all_classes else {}
    lines = []
    for norm in dict.fromkeys(row.norm for row in rows):
        errors = [row.error for row in rows if row.norm == norm]
        lines.append([norm, paper.get(norm), *mean_and_std(errors), len(errors)])
    headers = ["norm", "paper, error %", "ours, error %", "standard deviation", "seeds"]
    return (
        f"{markdown(lines, headers)}\n\n{first.dataset}, {first.classes} classes, {first.train_images} training and "
        f"{first.test_images} test images of {first.image_size} pixels, R-{first.depth}, {first.epochs} epochs"
    )


def paper_table() -> str:
    lines = [
        [dataset, f"R-{depth}", *(errors.get(norm) for norm in ("GN", "GN1", "PGN"))]
        for (dataset, depth), errors in TABLE_4.items()
    ]
    return markdown(lines, ["paper's error %", "", "G = 32", "G = 1", "practical"])


def add_arguments(parser) -> None:
    add_outputs(parser, json="write a row for each run")
    parser.add_argument(
        "--dataset",
        default="caltech-101",
        metavar="NAME",
        help=f"{PET}, or a name of your own for the folders of classes in ROOT; default: %(default)s",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="ROOT",
        help="folder that has a folder of images for each class, such as 101_ObjectCategories of Caltech-101 "
        f"(https://data.caltech.edu/records/mzrjq-6wc02); {PET} is downloaded there if it is missing",
    )
    parser.add_argument(
        "--classes", type=count, metavar="N", help="take only the N classes with the fewest images; default: all"
    )
    parser.add_argument(
        "--depth", type=int, default=50, choices=(50, 101), help="the ResNet's depth; default: %(default)s"
    )
    add_norms(parser, "GN", "GN1", "PGN")
    add_seeds(parser)
    parser.add_argument(
        "--weights",
        default="",
        metavar="FILE.pkl",
        help="a file of tools/convert_weights.py to start from; default: train from scratch",
    )
    parser.add_argument("--epochs", type=count, default=100, help="default: %(default)s")
    parser.add_argument("--image-size", type=count, default=128, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--batch-size", type=count, default=64, metavar="IMAGES", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=0.005, help="learning rate; default: %(default)s")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after this time; a test that has begun is finished; default: never",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="load images in N processes; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        default="output/classifier",
        metavar="DIR",
        help="folder in which each run gets a folder with its checkpoints; default: %(default)s",
    )


def main(args) -> None:
    until = time.monotonic() + 60 * args.minutes
    prepare_outputs(args.json)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: a CUDA GPU was not found by PyTorch")
    for norm in args.norms:
        get_norm(norm, 64)
    images = load_images(args.dataset, args.data, args.classes)
    runs = [
        ClassifierRun(
            norm=norm,
            seed=seed,
            dataset=args.dataset,
            classes=len(images.classes),
            train_images=len(images.train),
            test_images=len(images.test),
            depth=args.depth,
            weights=os.path.basename(args.weights),
            epochs=args.epochs,
            image_size=args.image_size,
            batch_size=args.batch_size,
            lr=args.lr,
            amp=args.device == "cuda",
        )
        for seed in args.seeds
        for norm in args.norms
    ]
    rows = train_all(runs, images, args.output, args.weights, args.workers, until)
    if rows:
        write_rows(args.json, rows)
        print(table(rows, args.classes is None))
    if len(rows) < len(runs):
        print(f"{len(rows)} of {len(runs)} runs are finished; {IF_STOPPED}")
