"""Turn a ResNet's batch-norm weights under torchvision's names into a Detectron2 checkpoint with group norms."""

from collections.abc import Sequence

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as T

from gng_d2.errors import InputError
from gng_d2.models.calibrate_norms import calibrate

from .data.images import read_image
from .files import prepare_outputs
from .resnet_weights import Conversion, config_keys, read_resnet
from .weight_files import save_weight_file


def convert_and_calibrate(
    path: str, out: str, norm: str, images: Sequence[Tensor], depth: int | None = None
) -> Conversion:
    """Write the ResNet in ``path`` to ``out``, a .pth, with norms called ``norm`` that are calibrated on ``images``.

    The weights have the names that they have in a Detectron2 model with an FPN, and the file records the norms' groups.

    Args:
        images: batches as the ResNet expects them, normalized.

    Raises:
        InputError: the file is no such ResNet, or ``norm`` is no group norm.
    """
    if not out.endswith(".pth"):
        raise InputError(f"the output {out} must end in .pth, because a .pkl cannot hold the record of the norms")
    prepare_outputs(out)
    conversion = read_resnet(path, depth)
    if conversion.norm != "BN":
        raise InputError(f"{path} has group norms, which need no calibration. Leave out --norm and --calibrate")
    reference, model = _resnet(conversion, "FrozenBN"), _resnet(conversion, norm)
    if not any(isinstance(module, nn.GroupNorm) for module in model.modules()):
        raise InputError(f"--norm {norm} is no group norm")
    calibrate(model, reference, images)
    detector = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": model})})
    save_weight_file(out, {"model": detector.state_dict()})
    return conversion


def _resnet(conversion, norm):
    cfg = get_cfg()
    cfg.merge_from_list(config_keys(conversion).split())
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.OUT_FEATURES = norm, ["res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    channels = conversion.weights["stem.conv1.weight"].shape[1]
    model = build_resnet_backbone(cfg, ShapeSpec(channels=channels))
    weights = {name: torch.from_numpy(value) for name, value in conversion.weights.items()}
    model.load_state_dict(weights, strict=False)  # not strict: a group norm has no place for statistics
    return model.eval()


def read_images(paths: Sequence[str], size: int, mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
    """The images in ``paths`` as batches of one: RGB from 0 to 255, their shorter side ``size``, normalized."""
    batches = []
    for path in paths:
        try:
            image = Image.fromarray(read_image(path, "RGB"))
        except Exception as error:  # Pillow raises half a dozen kinds
            raise InputError(f"--calibrate: {path} cannot be read as an image: {error}") from error
        pixels = T.pil_to_tensor(T.resize(image, size)).float()
        batches.append(T.normalize(pixels, mean, std)[None])
    return batches
