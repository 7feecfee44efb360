"""Which layer made the tensor that reaches a norm, as autograd recorded it: what a norm looks at while it trains.

Only names, shapes and plain numbers of autograd's nodes are read. A saved tensor never is: to unpack one computes it
again, or fails, where activations are checkpointed.
"""

import logging
import re
from functools import cache

from torch import Tensor, nn

from gng_d2.errors import InputError
from gng_d2.groups import practical_num_groups

from .kinds import NO_LAYER, Producer
from .module_path import live_modules, module_path, owner_of

__all__ = ["MEND", "look", "made_by"]

MEND = (
    "Register it as `norm` of its layer or right after it in the same module, or call "
    "gng_d2.bind_norms(model, example_inputs) before the optimizer is made (PGN without WS also takes in_channels=)"
)


# the edge of a node that leads to the weight; the one before it leads to the input
_WEIGHT_EDGE = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1}
# what leaves the values and the channels as they are
_VIEWS = frozenset(
    "View UnsafeView ReshapeAlias Transpose T Permute Squeeze Unsqueeze ToCopy Alias Clone".split(),
)
_COMBINATIONS = frozenset("Add Sub Mul Div Maximum Minimum Where".split())
# What surely is no layer with a weight. Of other ops nothing is known: dropout is a product with a mask, a slice may
# be of a convolution, a function of the user's own may be one.
_NO_LAYER_OP = re.compile(
    "^(Cat|Stack|Upsample|Mean|Sum|Hardtanh|Clamp|Threshold|Elu|Celu|Silu|Gelu|Glu|Hardswish|Hardsigmoid|Sigmoid|"
    "Tanh|Softplus|Softmax|Mish)|Pool|Relu|PreluKernel|(Batch|Group|Layer)Norm"
)


def made_by(tensor: Tensor) -> Producer | None:
    """The layer that made ``tensor``, the op that did and surely is none, or None where that cannot be seen.

    Examples::
        >>> x = nn.Conv2d(24, 8, 1)(torch.ones(1, 24, 2, 2))
        >>> made_by(x.flatten(2))[:3], made_by(x.relu()).op, made_by(x.detach())
        (('Convolution', 24, 8), 'Relu', None)
    """
    node = tensor.grad_fn
    while node is not None:
        name = node.name()
        if name in _WEIGHT_EDGE:
            return _layer(node, name)
        op = name.rpartition("Backward")[0]
        if op in _VIEWS:
            node = node.next_functions[0][0]
            continue
        if op in _COMBINATIONS:
            inputs = [n for n, _ in node.next_functions if n is not None]
            computed = [n for n in inputs if _parameter(n) is None]
            if len(computed) > 1:
                return Producer(op)
            if op != "Add" or len(inputs) == 1 or not computed:
                return None
            node = computed[0]  # what is added is a bias
            continue
        return Producer(op) if _NO_LAYER_OP.search(op) else None
    return None


def _layer(node, name):
    if not hasattr(node, "_input_metadata"):  # not in every version of PyTorch
        return None
    edge = _WEIGHT_EDGE[name]
    weight, weight_index = node.next_functions[edge]
    source, index = node.next_functions[edge - 1] if name != "ConvolutionBackward0" else node.next_functions[0]
    if weight is not None:
        shape = weight._input_metadata[weight_index].shape
        if name != "ConvolutionBackward0" or node._saved_transposed:
            n_in = shape[0]
        else:
            n_in = shape[1] * node._saved_groups
    elif source is not None:
        n_in = source._input_metadata[index].shape[1]
    else:
        return None
    return Producer(name.rpartition("Backward")[0], int(n_in), int(node._input_metadata[0].shape[1]), weight=weight)


def _parameter(node) -> nn.Parameter | None:
    """The parameter that ``node`` leads to through views alone."""
    while node is not None and node.name().rpartition("Backward")[0] in _VIEWS:
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)  # of AccumulateGrad alone
    return variable if isinstance(variable, nn.Parameter) else None


def look(norm: nn.Module, input: Tensor) -> None:
    """Compare the layer that made ``input`` with the one that ``norm`` took for it; an unbound ``norm`` takes it.

    Raises:
        InputError: they differ, or no single layer made ``input``.
    """
    made = made_by(input)
    if made is not None and made.is_layer and made.n_out != norm.num_channels:
        return
    if not norm.is_bound():
        _bind(norm, made)
    elif norm.weight_layer is None:
        _compare_with_given(norm, made)
    elif norm.weight_layer != NO_LAYER:
        _compare(norm, made)


def _bind(norm, made):
    if made is not None and not made.is_layer:
        raise norm.unbound_error(f"its input is made by {made}, which has no weight")
    if made is None or norm.weight_standardization:  # whose convolution has already run
        return
    norm.bind(made.n_in, str(made))
    _warn_once(
        "PracticalGroupNorm layers that met no weight layer when the model was built take their groups in this "
        "training step, from the layers that made their inputs. Copies of the model that were made earlier (EMA, "
        "replicas) are not bound: gng_d2.bind_norms(model, example_inputs), called before them, binds all"
    )


def _compare_with_given(norm, made):
    if made is not None and made.is_layer and made.n_in != norm.in_channels:
        path, layer = _paths(norm, made)
        _warn_once(
            f"{path}: this norm was given in_channels={norm.in_channels}, which stands, but the layer that made its "
            f"input, {layer}, has {made.n_in}"
        )


@cache
def _warn_once(message):
    logging.getLogger(__name__).warning(message)


def _compare(norm, made):
    if made is None:
        return
    if not made.is_layer:
        why = ", which has no weight"
    elif made.n_in != norm.in_channels:
        why = ""
        if hasattr(norm, "gain_ratio"):
            groups = practical_num_groups(made.n_in, norm.num_channels, norm.gain_ratio)
            why = f", for which it would have num_groups={groups}, not {norm.num_groups}"
    elif norm.weight_standardization and _is_raw(made.weight):
        why = ", whose weight is not standardized"
    else:
        return
    path, found = _paths(norm, made)
    raise InputError(
        f"{path}: this {norm.norm_name()} was bound to {norm.weight_layer}, but its input is made by {found}{why}. "
        f"{MEND}"
    )


def _is_raw(weight):
    """Whether it is a parameter, and not what weight standardization makes of one (which leaves single numbers)."""
    parameter = _parameter(weight)
    return parameter is not None and parameter.numel() > parameter.shape[0]


def _paths(norm, made):
    """Of ``norm``, and what made its input: "neck.conv (Conv2d(512, 64))", where its weight is a parameter."""
    modules = live_modules()
    path = module_path(norm, modules)
    parameter = _parameter(made.weight)
    owner = None if parameter is None else owner_of(parameter, modules)
    if owner is None:
        return path, str(made)
    return path, f"{module_path(owner, modules)} ({type(owner).__name__}({made.n_in}, {made.n_out}))"
