"""A network that was trained with batch norm, MobileNetV2, and real images to test it on, Caltech-101."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.models import mobilenet_v2
from torchvision.transforms import functional as T

from command_line import count
from gng_d2.errors import InputError
from gng_d2.job.weight_files import read_weight_file

from .rows import add_seeds

TRAIN, TEST = 20, 10  # images of each class
DECAY = 1e-3  # of the weights of a linear head


@dataclass(frozen=True)
class Split:
    """Images (N, 3, size, size) in uint8 and their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_mobilenet(path: str) -> nn.Module:
    """torchvision's MobileNetV2 with the weights in ``path``, in eval mode. It returns the features that its classifier
    would take.

    Raises:
        InputError: the file is not there, or its weights are of another network.
    """
    model = mobilenet_v2()
    model.classifier = nn.Identity()
    weights = {name: value for name, value in read_weight_file(path).items() if not name.startswith("classifier.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"--weights {path}: {error}") from None
    return model.eval()


def split(root: str, size: int, seed: int) -> Split:
    """20 images of each class to train with and 10 to test with, drawn by ``seed``. Of each image it is the central
    square, ``size`` pixels wide.

    Raises:
        InputError: ``root`` has no folders of classes, or a class has fewer images.
    """
    try:
        images = ImageFolder(root)
    except OSError as error:
        raise InputError(f"--data {root}: {error}") from error
    labels, draw = np.array(images.targets), np.random.default_rng(seed)
    drawn = [draw.permutation(np.flatnonzero(labels == label))[: TRAIN + TEST] for label in range(len(images.classes))]
    fewest = min(drawn, key=len)
    if len(fewest) < TRAIN + TEST:
        raise InputError(f"--data {root}: a class has {len(fewest)} images, and {TRAIN + TEST} are needed")
    train, test = (np.concatenate([d[part] for d in drawn]) for part in (slice(TRAIN), slice(TRAIN, None)))
    return Split(
        *(
            tensor
            for places in (train, test)
            for tensor in (
                torch.stack([_image(images.samples[i][0], size) for i in places]),
                torch.tensor(labels[places]),
            )
        )
    )


def _image(path, size):
    image = T.center_crop(T.resize(Image.open(path).convert("RGB"), size * 8 // 7), size)
    return T.pil_to_tensor(image)


def normalized(images: Tensor) -> Tensor:
    """Images from 0 to 255 as torchvision's networks take them."""
    return T.normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """What ``model``, in eval mode, returns for images from 0 to 255, in batches of 32."""
    model.eval()
    return torch.cat([model(normalized(batch)) for batch in images.split(32)])


def linear_head(inputs: Tensor, labels: Tensor) -> nn.Linear:
    """A head trained by logistic regression. The features are centred and divided by their mean deviation for that, and
    the head is then changed so that it takes them as they are.

    It computes in float64, because the features of a network that is lost can have a mean thousands of times their
    deviation.
    """
    inputs = inputs.double()
    mean, scale = inputs.mean(0), inputs.std(0).mean()
    centred = (inputs - mean) / scale
    head = nn.Linear(inputs.shape[1], int(labels.max()) + 1, dtype=torch.float64)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(head(centred), labels) + DECAY / 2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        head.weight /= scale
        head.bias -= head.weight @ mean
    return head


@torch.no_grad()
def right(head: nn.Linear, inputs: Tensor, labels: Tensor) -> float:
    """The share of the inputs that ``head`` labels rightly, in %."""
    return 100 * (head(inputs.to(head.weight.dtype)).argmax(1) == labels).double().mean().item()


def add_data(parser) -> None:
    """Give ``parser`` the flags that say on what to measure, and ``--resume``."""
    parser.add_argument(
        "--data", required=True, metavar="ROOT", help="folder of Caltech-101, with a folder for each class"
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE.pth",
        help="MobileNetV2 with ImageNet weights under torchvision's names, such as its mobilenet_v2-b0353104.pth",
    )
    add_seeds(parser)
    parser.add_argument("--image-size", type=count, default=128, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that --json has, from any machine and of any seeds and norms, and measure what is missing",
    )
