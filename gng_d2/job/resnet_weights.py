"""Convert a ResNet's weights from torchvision's names, which timm and mmdetection use too, to Detectron2's."""

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import resnet

from gng_d2.errors import InputError, abbreviated

from .files import atomic_open, prepare_outputs
from .weight_files import read_weight_file

# how many blocks layer1 to layer4 have, by depth; they are basic blocks below 50, and bottlenecks from there on
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_A_BLOCK = "layer1.0.conv1.weight"  # every ResNet has it


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_resnet` made of a checkpoint."""

    weights: dict[str, np.ndarray]  # by Detectron2's names, in float32
    depth: int
    norm: str  # "BN" where the norms have running statistics, otherwise "GN"
    num_groups: int  # as MODEL.RESNETS.NUM_GROUPS
    width_per_group: int  # as MODEL.RESNETS.WIDTH_PER_GROUP
    dropped: dict[str, list[str]]  # names by why they were dropped


def convert_file(path: str, out: str, depth: int | None = None) -> Conversion:
    """Convert the checkpoint ``path`` to ``out``, a .pkl that Detectron2's checkpointer loads.

    Raises:
        InputError: names the file, and what it lacks or has too much.
    """
    if not out.endswith(".pkl"):
        raise InputError(f"the output {out} must end in .pkl, by which Detectron2 knows such a file")
    conversion = read_resnet(path, depth)
    write_weights(out, conversion.weights, author=f"gng_d2, from {os.path.basename(path)}")
    return conversion


def read_resnet(path: str, depth: int | None = None) -> Conversion:
    """:func:`convert_resnet` of a file. Its errors name the file."""
    checkpoint = read_weight_file(path)
    try:
        return convert_resnet(checkpoint, depth)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_weights(path: str, weights: Mapping[str, np.ndarray], author: str) -> None:
    """Write ``weights`` in the format of Detectron2's model zoo, whole or not at all.

    Raises:
        InputError: ``path`` cannot be written.
    """
    # by matching_heuristics the names get the prefix that they have in a model, such as backbone.bottom_up.
    content = {"model": dict(weights), "__author__": author, "matching_heuristics": True}
    prepare_outputs(path)
    with atomic_open(path, "wb") as file:
        pickle.dump(content, file)


def convert_resnet(checkpoint: Mapping[str, Any], depth: int | None = None) -> Conversion:
    """Rename a ResNet's weights from torchvision's names to Detectron2's.

    Args:
        checkpoint: tensors by name, or a dict that has them under ``state_dict`` or ``model``. The names may begin with
            a prefix, such as ``module.backbone.``; what does not begin with it is dropped. A norm is called bn1, gn1 or
            norm1.
        depth: of the ResNet that is expected; None takes any.

    Raises:
        InputError: it is no ResNet, not one but several, one that Detectron2's cannot hold, one of another depth, or
            not whole.
    """
    state, beside = _unwrap(checkpoint)
    state, outside = _strip_prefix(state)
    classifier = [name for name in state if name.startswith("fc.")]
    counters = [name for name in state if name.endswith(".num_batches_tracked")]
    state = {name: value for name, value in state.items() if name not in {*classifier, *counters}}
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout is not torch.strided:
            raise InputError(f"{name} is no dense tensor of floating-point numbers")

    found = _depth(state)
    if depth not in (None, found):
        raise InputError(f"it is a ResNet-{found}, not a ResNet-{depth}")
    norm = next((n for n in ("bn", "gn", "norm") if any(re.search(rf"\b{n}\d\.", name) for name in state)), "bn")
    statistics = any(name.endswith(".running_mean") for name in state)
    num_groups, per_group = _groups(state, found)
    _check_shapes(state, found, norm, statistics, num_groups, per_group)

    reasons = {
        "beside the weights": beside,
        "outside the backbone": outside,
        "the classifier": classifier,
        "counters of BatchNorm's steps": counters,
    }
    arrays = {name: value.detach().float().numpy() for name, value in state.items()}
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(f"it has NaN or infinite weights, in {abbreviated(broken)}")
    return Conversion(
        weights={_detectron2s_name(name, norm): array for name, array in arrays.items()},
        depth=found,
        norm="BN" if statistics else "GN",
        num_groups=num_groups,
        width_per_group=per_group,
        dropped={reason: dropped for reason, dropped in reasons.items() if dropped},
    )


def config_keys(conversion: Conversion) -> str:
    """The config of a model for such weights, as ``KEY VALUE`` pairs."""
    resnets = {
        "DEPTH": conversion.depth,
        "NUM_GROUPS": conversion.num_groups,
        "WIDTH_PER_GROUP": conversion.width_per_group,
        "STRIDE_IN_1X1": False,
    }
    if conversion.depth < 50:
        resnets["RES2_OUT_CHANNELS"] = 64
    return " ".join(f"MODEL.RESNETS.{key} {value}" for key, value in resnets.items())


def _unwrap(checkpoint):
    """The state dict in a checkpoint, and the names of what lies beside it."""
    beside = []
    while isinstance(checkpoint, Mapping):
        wrapper = next((k for k in ("state_dict", "model") if isinstance(checkpoint.get(k), Mapping)), None)
        if wrapper is None:
            break
        beside += [str(key) for key in checkpoint if key != wrapper]
        checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, Mapping) or not all(isinstance(key, str) for key in checkpoint):
        raise InputError("it has no weights by name")
    return checkpoint, beside


def _strip_prefix(state):
    """The ResNet in a state dict, under torchvision's names, and the names of what lies outside of it."""
    prefixes = [name.removesuffix(_A_BLOCK) for name in state if name.endswith(_A_BLOCK)]
    if not prefixes:
        raise InputError(
            f"no ResNet under torchvision's names (conv1.weight, {_A_BLOCK}, ...): "
            f"{'it has ' + abbreviated(state) if state else 'it is empty'}"
        )
    if len(prefixes) > 1:
        raise InputError(f"it has several ResNets, under {', '.join(map(repr, prefixes))}. Save one of them alone")
    inside = {name.removeprefix(prefixes[0]): v for name, v in state.items() if name.startswith(prefixes[0])}
    return inside, [name for name in state if not name.startswith(prefixes[0])]


def _depth(names):
    blocks = {match.groups() for name in names if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    counts = tuple(sum(layer == number for layer, _ in blocks) for number in "1234")
    bottleneck = any(".conv3." in name for name in names)
    for depth, known in _BLOCKS.items():
        if known == counts and (depth >= 50) == bottleneck:
            return depth
    raise InputError(
        f"no ResNet of depth {', '.join(map(str, _BLOCKS))}: its layer1 to layer4 have "
        f"{', '.join(map(str, counts))} {'bottleneck' if bottleneck else 'basic'} blocks"
    )


def _groups(state, depth):
    """The number of groups of the 3x3 convolutions, and the width of one in the first block."""
    first, second = (state.get(f"layer1.0.conv{i}.weight") for i in (1, 2))
    if depth < 50 or second is None or second.ndim != 4 or not first.ndim:  # what is wrong is named later
        return 1, 64
    return max(len(first) // max(second.shape[1], 1), 1), max(second.shape[1], 1)


def _check_shapes(state, depth, norm, statistics, num_groups, width_per_group):
    """See that ``state`` has the tensors of such a ResNet, in its shapes, and no others."""
    block = resnet.BasicBlock if depth < 50 else resnet.Bottleneck
    make_norm = nn.BatchNorm2d if statistics else lambda channels: nn.GroupNorm(1, channels)
    with torch.device("meta"):
        model = resnet.ResNet(block, _BLOCKS[depth], 1, False, num_groups, width_per_group, norm_layer=make_norm)
    shapes = {re.sub(r"\bbn(\d)", rf"{norm}\1", name): tuple(value.shape) for name, value in model.state_dict().items()}
    if "conv1.weight" in state and state["conv1.weight"].ndim == 4:  # images may have any number of channels
        shapes["conv1.weight"] = (64, state["conv1.weight"].shape[1], 7, 7)
    shapes = {n: s for n, s in shapes.items() if not n.startswith("fc.") and not n.endswith("num_batches_tracked")}
    unknown = [name for name in state if name not in shapes]
    if unknown:
        raise InputError(f"Detectron2's ResNet-{depth} has no place for {abbreviated(unknown)}")
    missing = [name for name in shapes if name not in state]
    if missing:
        raise InputError(f"the ResNet-{depth} is not whole, missing: {abbreviated(missing)}")
    for name, value in state.items():
        if tuple(value.shape) != shapes[name]:
            raise InputError(
                f"{name} has the shape {tuple(value.shape)}; Detectron2's ResNet-{depth} has {shapes[name]} there"
            )


def _detectron2s_name(name, norm):
    name = re.sub(rf"\b{norm}(\d)\.", r"conv\1.norm.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    layer = re.match(r"layer(\d)\.", name)
    return f"res{int(layer[1]) + 1}.{name[layer.end() :]}" if layer else f"stem.{name}"
