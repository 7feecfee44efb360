"""What is known of each norm's place in a model: the layers that feed it, and the size of its inputs."""

import math
import re
from collections import defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from gng_d2.errors import InputError
from gng_d2.layers.binding import named_norms
from gng_d2.layers.group_norm import GroupNorm
from gng_d2.layers.kinds import NO_LAYER, Producer, layer_shape, num_channels
from gng_d2.layers.producers import find_producers
from gng_d2.layers.running import tensors_in

from .bind_norms import runnable

# Fewer numbers lose their values when they are normalized: any two become +1 and -1.
NUMBERS_IN_A_GROUP = 16


@dataclass
class Place:
    """What is known of a norm's place in the model."""

    # the weight layers that feed it, all of the same sizes; empty: no single layer feeds it; None: not known
    producers: list[Producer] | None = None
    shapes: list[tuple] = field(default_factory=list)  # the shapes of its inputs, if the model was run
    size: tuple | None = None  # the spatial size of its smallest input, if it has one
    is_pooled: bool = False  # whether wider images do not change that size, as behind a global pooling


def find_places(model: nn.Module, example_inputs: Any) -> dict[nn.Module, Place]:
    """What feeds each norm: found by running the model, or from the order of registration or the norm's record."""
    norms = [m for name, m in model.named_modules() if _is_norm(m) and "parametrizations" not in name.split(".")]
    found = {norm: Place() for norm in norms}
    registered = defaultdict(list)
    for _, norm, _, layer in named_norms(model):
        registered[norm].append(layer)
    for norm, place in found.items():
        layers = registered[norm]
        sizes = {layer and layer_shape(layer) for layer in layers}
        if len(sizes) == 1 and (n_in_and_n_out := sizes.pop()):
            place.producers = [Producer(type(layer).__name__, *n_in_and_n_out, layer) for layer in layers]
        elif isinstance(norm, GroupNorm) and norm.weight_layer == NO_LAYER:
            place.producers = []
        elif isinstance(norm, GroupNorm) and norm.in_channels is not None:
            op = (norm.weight_layer or "Layer").partition("(")[0]
            place.producers = [Producer(op, norm.in_channels, norm.num_channels)]
        place.size = getattr(norm, "pooled_to", None)
        place.is_pooled = place.size is not None
    if example_inputs is not None:
        with runnable(norm for norm in norms if isinstance(norm, GroupNorm)):
            _find_by_running(model, found, example_inputs)
    return found


def _find_by_running(model, found, example_inputs):
    shapes = defaultdict(list)
    with _noting(found, shapes):
        calls = find_producers(model, found, example_inputs)
    for norm, made in calls.items():
        place = found[norm]
        if None in made:
            place.producers = None
        elif len({producer[1:3] for producer in made}) == 1 and made[0].n_out == num_channels(norm):
            place.producers = list(dict.fromkeys(made))
        else:
            place.producers = []
        place.shapes, place.size, place.is_pooled = shapes[norm], _smallest(shapes[norm]), False
    small = [norm for norm in calls if found[norm].size and math.prod(found[norm].size) < NUMBERS_IN_A_GROUP]
    if small:
        wider = defaultdict(list)
        with _noting(small, wider), suppress(InputError):  # norms before the failure are still seen
            find_producers(model, (), _wider(example_inputs))
        for norm in small:
            found[norm].is_pooled = _smallest(wider[norm]) == found[norm].size


def _smallest(shapes):
    return min((shape[2:] for shape in shapes if len(shape) > 2), key=math.prod, default=None)


def _wider(example_inputs):
    """With images at least twice as wide, so that more than one pixel is left after all strides. Where there are no
    images, tensors of two dimensions are widened, as they may be sequences."""
    dimensions = [tensor.dim() for tensor in tensors_in(example_inputs)]
    least = 3 if max(dimensions, default=0) > 2 else 2

    def wider(x):
        return x if x.dim() < least else x.repeat(*[1] * (x.dim() - 1), max(2, math.ceil(512 / max(x.shape[-1], 1))))

    return tree_map_only(Tensor, wider, example_inputs)


def _noting(norms, shapes):
    """A context in which the shapes of the inputs of ``norms`` are added to ``shapes``."""

    def note(norm, args, kwargs):
        shapes[norm] += [tuple(tensor.shape) for tensor in tensors_in((args, kwargs))[:1]]

    stack = ExitStack()
    for norm in norms:
        stack.callback(norm.register_forward_pre_hook(note, with_kwargs=True).remove)
    return stack


def _is_norm(module):
    """Whether it is a norm, as far as its class or the name of its class shows, without a layer inside."""
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return True
    named = re.search("norm|abn", type(module).__name__, re.IGNORECASE)
    own = [*module.parameters(False), *module.buffers(False)]
    within = (m for child in module.children() for m in child.modules())
    return bool(named and own) and not any(m._parameters for m in within)
