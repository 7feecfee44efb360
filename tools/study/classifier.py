"""Detectron2's ResNets as image classifiers under any norm: Section 3.2 and Table 4.

The paper's hyper-parameters are in an appendix that is not at hand. These are common ones, for training from
scratch: SGD with momentum 0.9, learning rate 0.005 with a linear warmup over the first 5 % and a cosine decay to
0, weight decay 1e-4 but none on norms, 100 epochs of batches of 64, images of 128 x 128 pixels: a random crop of
8 to 100 % of the image and a random flip in training, the central 7/8 in the test. The test error is that of the
last step. Of a folder of classes a random 80 % of each class are for training, the same for every run;
Oxford-IIIT Pet has its own split. The learning rate was chosen by the train loss of R-50 with GN alone: on
Caltech-101, in 60 steps of 16 images of 64 pixels, it rose from 5 to 35 at 0.025, and to 8 at 0.005.
"""

import itertools
import os
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import AMPTrainer, SimpleTrainer, hooks
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder, OxfordIIITPet

from gng_d2.checkpoint import Checkpointer
from gng_d2.data.loader import PlaceSampler, SeededDataset, seed_everything
from gng_d2.errors import InputError

__all__ = ["PET", "ImageSet", "load_images", "Classifier", "num_iterations", "train"]

PET = "oxford-iiit-pet"


@dataclass(frozen=True)
class ImageSet:
    """Pairs of a PIL image and its label."""

    train: Dataset
    test: Dataset
    classes: List[str]


def load_images(dataset: str, root: str, num_classes: Optional[int] = None) -> ImageSet:
    """Oxford-IIIT Pet, downloaded to ``root`` if it is not there, or else the folders of classes in ``root``.

    Args:
        num_classes: take only so many folders, those with the fewest images.

    Raises:
        InputError: they are not there, cannot be downloaded, or hold no images.
    """
    try:
        if dataset == PET:
            splits = [OxfordIIITPet(root, split, download=True) for split in ("trainval", "test")]
            return ImageSet(*splits, splits[0].classes)
        return _split(ImageFolder(root), num_classes)
    except Exception as error:  # each way of fetching and reading raises its own
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
    """Detectron2's ResNet with a linear layer on its average; a model for Detectron2's trainers.

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


def num_iterations(settings: Dict) -> int:
    return max(settings["epochs"] * settings["train_images"] // settings["batch_size"], 1)


def _solver(settings):
    """Detectron2's config of a run's optimizer, whose momentum and weight decay are its defaults."""
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = settings["lr"]
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.MAX_ITER = num_iterations(settings)
    cfg.SOLVER.WARMUP_ITERS = cfg.SOLVER.MAX_ITER // 20
    return cfg


def train(
    settings: Dict,
    images: ImageSet,
    folder: str,
    *,
    weights: str = "",
    device: str = "cpu",
    workers: int = 0,
    on_step: Callable = lambda done: None,
) -> float:
    """Train one classifier and return its test error in %.

    The initial weights, the order of the images and their augmentation follow from the seed and the step alone,
    and are the same for every norm. Where ``folder`` has a checkpoint of this run it goes on there, as if it
    had not been stopped: bit by bit on a CPU with as many threads.

    Args:
        settings: ``depth, norm, seed, epochs, image_size, batch_size, lr, amp, train_images``.
        weights: a .pkl of ``tools/convert_weights.py`` to start from.
        workers: processes that load images.
        on_step: called with the number of steps since the last call.

    Raises:
        InputError: ``weights`` cannot be read or are no such ResNet's.
        FloatingPointError: the loss is not finite.
    """
    os.makedirs(folder, exist_ok=True)
    seed_everything(settings["seed"])
    model = Classifier(settings["depth"], settings["norm"], len(images.classes)).to(device)
    cfg = _solver(settings)
    optimizer = build_optimizer(cfg, model)
    train_transform, test_transform = _transforms(settings["image_size"])

    def batches():  # from the step that the trainer has come to when it asks for the first
        dataset = _Transformed(images.train, train_transform)
        start = trainer.iter * settings["batch_size"]
        yield from DataLoader(
            SeededDataset(list(range(len(dataset))), dataset.__getitem__, settings["seed"]),
            sampler=PlaceSampler(
                TrainingSampler(len(dataset), seed=settings["seed"]),
                lambda places: itertools.islice(places, start, None),
            ),
            batch_size=settings["batch_size"],
            num_workers=workers,
        )

    trainer = (AMPTrainer if settings["amp"] else SimpleTrainer)(model, batches(), optimizer)
    checkpointer = Checkpointer(model, folder, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
            hooks.PeriodicCheckpointer(checkpointer, -(-cfg.SOLVER.MAX_ITER // 10), max_to_keep=1),
            hooks.CallbackHook(after_step=lambda _: on_step(1)),
        ]
    )
    resumed = checkpointer.has_checkpoint()
    if weights and not resumed:
        _check_weights(model, checkpointer, weights)
    checkpointer.resume_or_load(weights)
    start = trainer.iter + 1 if resumed else 0
    on_step(start)
    trainer.train(start, cfg.SOLVER.MAX_ITER)
    test = _Transformed(images.test, test_transform)
    return _test_error(model, DataLoader(test, settings["batch_size"], num_workers=workers))


def _check_weights(model, checkpointer, weights):
    """Detectron2's checkpointer only warns of what is missing."""
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
