"""ResNet weights under torchvision's names (timm's and mmdetection's too) become Detectron2's.

Nothing that a file holds is run on the way: only tensors, numbers, texts and containers of them are read.
"""

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

__all__ = ["DEPTHS", "Conversion", "config_keys", "convert_file", "convert_resnet", "write_weights"]

# blocks of layer1 ... layer4; basic blocks below 50, bottlenecks from there on
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
DEPTHS = tuple(_BLOCKS)
_A_BLOCK = "layer1.0.conv1.weight"  # every ResNet has it
_PREFIX = r"(?:module\.)*(backbone\.)?(?:module\.)*"  # what is stripped


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_resnet` made of a checkpoint."""

    weights: dict[str, np.ndarray]  # by Detectron2's names, in float32
    depth: int
    norm: str  # "BN" where the norms have running statistics, otherwise "GN"
    num_groups: int  # of the 3x3 convolutions, and
    width_per_group: int  # as MODEL.RESNETS has them
    dropped: dict[str, list[str]]  # names by the reason


def convert_file(path: str, out: str, depth: int | None = None) -> Conversion:
    """Convert the checkpoint ``path`` to ``out``, a .pkl that Detectron2's checkpointer loads.

    Raises:
        InputError: names the file, and what it lacks or has too much.
    """
    if not out.endswith(".pkl"):
        raise InputError(f"the output {out} must end in .pkl: by that Detectron2 tells such a file")
    if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
        raise InputError(f"the output {out} is the input: give it another name")
    checkpoint = read_weight_file(path)
    try:
        conversion = convert_resnet(checkpoint, depth)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    write_weights(out, conversion.weights, author=f"gng_d2, from {os.path.basename(path)}")
    return conversion


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
        checkpoint: tensors by name, or a dict that has them under ``state_dict`` or ``model``; the names
            may begin with ``module.`` and ``backbone.``. A norm is called bn1, gn1 or norm1. Where some
            names begin with ``backbone.``, the others are dropped.
        depth: of the ResNet that is expected; None takes any.

    Raises:
        InputError: it is no ResNet, one that Detectron2's cannot hold, one of another depth, or not whole.
    """
    state, beside = _unwrap(checkpoint)
    _check_prefixes(state)
    state, outside = _strip_prefixes(state)
    classifier = [name for name in state if name.startswith("fc.")]
    counters = [name for name in state if name.endswith(".num_batches_tracked")]
    state = {name: value for name, value in state.items() if name not in {*classifier, *counters}}

    found = _depth(state)
    if depth not in (None, found):
        raise InputError(f"it is a ResNet-{found}, not a ResNet-{depth}")
    norm = next((n for n in ("bn", "gn", "norm") if any(re.search(rf"\b{n}\d\.", name) for name in state)), "bn")
    statistics = any(name.endswith(".running_mean") for name in state)
    num_groups, per_group = _groups(state, found)
    _check_tensors(state, found, _shapes(state, found, norm, statistics, num_groups, per_group))

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


def config_keys(conversion: Conversion) -> list[str]:
    """The config that such weights need, as lines of ``KEY VALUE`` pairs: the model's, then the images'.

    The names do not tell how images were made numbers. These are torchvision's, timm's and mmdetection's ways.
    """
    resnets = {
        "DEPTH": conversion.depth,
        "NUM_GROUPS": conversion.num_groups,
        "WIDTH_PER_GROUP": conversion.width_per_group,
        "STRIDE_IN_1X1": False,
    }
    if conversion.depth < 50:
        resnets["RES2_OUT_CHANNELS"] = 64
    return [
        " ".join(f"MODEL.RESNETS.{key} {value}" for key, value in resnets.items()),
        "INPUT.FORMAT RGB MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]",
    ]


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
    for key, value in checkpoint.items():  # "state_dict_ema", say
        if isinstance(value, Mapping) and any(str(name).endswith(_A_BLOCK) for name in value):
            raise InputError(f"its weights are under {key!r}. Save that alone: torch.save(checkpoint[{key!r}], OUT)")
    return checkpoint, beside


def _check_prefixes(names):
    """The prefixes of MoCo, Lightning, torch.compile, EMA and others: which of several is wanted, the user knows."""
    prefixes = [name.removesuffix(_A_BLOCK) for name in names if name.endswith(_A_BLOCK)]
    if prefixes and not any(re.fullmatch(_PREFIX, prefix) for prefix in prefixes):
        raise InputError(
            f"the names of its ResNet begin with {' or '.join(map(repr, prefixes))}. Strip that: torch.save("
            f"{{k.removeprefix({prefixes[0]!r}): v for k, v in weights.items() if k.startswith({prefixes[0]!r})}}, OUT)"
        )


def _strip_prefixes(state):
    """The state dict without ``module.`` and ``backbone.``, and the names outside a backbone, if it has one."""
    prefixes = {name: re.match(_PREFIX, name) for name in state}
    has_backbone = any(prefix.group(1) for prefix in prefixes.values())
    outside = [name for name, prefix in prefixes.items() if has_backbone and not prefix.group(1)]
    stripped = {}
    for name in state:
        if name not in outside:
            short = name[prefixes[name].end() :]
            if short in stripped:
                raise InputError(f"it has {short} twice, with and without a prefix")
            stripped[short] = state[name]
    return stripped, outside


def _depth(names):
    blocks = [re.match(r"layer([1-4])\.(\d+)\.", name) for name in names]
    numbers = [[int(block.group(2)) for block in blocks if block and int(block.group(1)) == i] for i in range(1, 5)]
    counts = tuple(max(n) + 1 if n else 0 for n in numbers)
    if not any(counts):
        raise InputError(
            f"no ResNet under torchvision's names (conv1.weight, layer1.0.conv1.weight, ...): "
            f"{'it has ' + abbreviated(names) if names else 'it is empty'}"
        )
    bottleneck = any(".conv3." in name for name in names)
    for depth, known in _BLOCKS.items():
        if known == counts and (depth >= 50) == bottleneck:
            return depth
    raise InputError(
        f"no ResNet of depth {', '.join(map(str, DEPTHS))}: its layer1 to layer4 have "
        f"{', '.join(map(str, counts))} {'bottleneck' if bottleneck else 'basic'} blocks"
    )


def _groups(state, depth):
    """The groups of the 3x3 convolutions, and the width of one in the first block."""

    def size(name, dim):  # of the first block's convolutions; a shape that cannot be is named later
        weight = state.get(f"layer1.0.{name}.weight")
        return max(weight.shape[dim], 1) if getattr(weight, "ndim", 0) == 4 else 64

    if depth < 50:
        return 1, 64
    return max(size("conv1", 0) // size("conv2", 1), 1), size("conv2", 1)


def _shapes(state, depth, norm, statistics, num_groups, width_per_group):
    """The shape of each tensor that such a ResNet has, by torchvision's names."""
    block = resnet.BasicBlock if depth < 50 else resnet.Bottleneck
    make_norm = nn.BatchNorm2d if statistics else lambda channels: nn.GroupNorm(1, channels)
    with torch.device("meta"):
        model = resnet.ResNet(block, _BLOCKS[depth], 1, False, num_groups, width_per_group, norm_layer=make_norm)
    shapes = {re.sub(r"\bbn(\d)", rf"{norm}\1", name): tuple(value.shape) for name, value in model.state_dict().items()}
    if getattr(state.get("conv1.weight"), "ndim", 0) == 4:  # images may have any number of channels
        shapes["conv1.weight"] = (64, state["conv1.weight"].shape[1], 7, 7)
    return {name: shape for name, shape in shapes.items() if not _is_left_out(name)}


def _is_left_out(name):
    return name.startswith("fc.") or name.endswith(".num_batches_tracked")


def _check_tensors(state, depth, shapes):
    unknown = [name for name in state if name not in shapes]
    if unknown:
        raise InputError(f"Detectron2's ResNet-{depth} has no place for {abbreviated(unknown)}")
    missing = [name for name in shapes if name not in state]
    if missing:
        raise InputError(f"the ResNet-{depth} is not whole, missing: {abbreviated(missing)}")
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout is not torch.strided:
            raise InputError(f"{name} is no dense tensor of floating-point numbers")
        if tuple(value.shape) != shapes[name]:
            raise InputError(
                f"{name} has the shape {tuple(value.shape)}; Detectron2's ResNet-{depth} has {shapes[name]} there"
            )


def _detectron2s_name(name, norm):
    name = re.sub(rf"\b{norm}(\d)\.", r"conv\1.norm.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    layer = re.match(r"layer(\d)\.", name)
    return f"res{int(layer[1]) + 1}.{name[layer.end() :]}" if layer else f"stem.{name}"
