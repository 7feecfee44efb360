"""Find out from autograd's record which layer made the input of a norm, while the norm trains.

This reads only names, shapes and plain numbers of autograd's nodes. It never reads a saved tensor: where activations
are checkpointed, unpacking one would recompute it, or fail.
"""

import logging
import re
from functools import cache

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gng_d2.errors import InputError

from .kinds import NO_LAYER, Producer
from .module_path import live_modules, module_path
from .origin import UNKNOWN, Origin, layer_output, op_kind, origin, unseen

MEND = (
    "Register it as `norm` of its layer or right after it in the same module, or call "
    "gng_d2.bind_norms(model, example_inputs) before an EMA or DDP is made (PGN without WS also takes in_channels=)"
)


# an autograd.Function that the user wrote may hold a weight, unless its name contains one of these
_HAS_NO_LAYER = re.compile("Norm|Relu|Pool")
_PARAMETER = Producer("a parameter")
# how many nodes of a history are followed back at most
_DEPTH = 150


def made_by(tensor: Tensor) -> Producer | None:
    """What made ``tensor``: a weight layer or another op; None where the record does not show it.

    Examples::
        >>> x = nn.Conv2d(24, 8, 1)(torch.ones(1, 24, 2, 2))
        >>> made_by(x.flatten(2))[:3], made_by(x.relu()).op, made_by(x.detach())
        (('Convolution', 24, 8), 'Relu', None)
    """
    if not hasattr(tensor.grad_fn, "_input_metadata"):  # some versions of PyTorch lack it
        return None
    return _Graph().origin(tensor.grad_fn, tensor.output_nr).made


class _Graph:
    """What autograd recorded, back to the last weight layers."""

    def __init__(self):
        self._known = {}

    def origin(self, node, index: int, depth: int = 0) -> Origin:
        if node is None:
            return UNKNOWN
        if (node, index) not in self._known:
            self._known[node, index] = self._origin(node, index, depth)
        return self._known[node, index]

    def _origin(self, node, index, depth):
        op, value = node.name().rpartition("Backward")[0] or node.name(), (node, index)
        shape = tuple(node._input_metadata[index].shape)
        if op == "Convolution":
            return self._convolution(op, node, shape, value)
        if hasattr(node, "variable"):  # a leaf: a tensor that gets a gradient itself
            parameter = isinstance(node.variable, nn.Parameter)
            return Origin(_PARAMETER if parameter else None, shape, shape, parameters=2 * parameter, value=node)
        if depth > _DEPTH:
            return unseen((), shape, value)
        operands = [self.origin(*edge, depth + 1) for edge in node.next_functions]
        if op == "BackwardHookFunction":  # the node of a module with a full backward hook
            return operands[index]
        if isinstance(node, BackwardCFunction) and not _HAS_NO_LAYER.search(op):
            return unseen(operands, shape, value)
        found = origin(op, operands, shape, value)
        if op_kind(op) == "copyslices":  # autograd does not show what was written
            return found._replace(made=None)
        return found

    def _convolution(self, op, node, shape, value):
        source, (weight, index) = node.next_functions[:2]
        if weight is not None:
            sizes = weight._input_metadata[index].shape
            n_in = sizes[0] if node._saved_transposed else sizes[1] * node._saved_groups
        elif source[0] is not None:
            n_in = source[0]._input_metadata[source[1]].shape[1]
        else:
            return UNKNOWN
        return layer_output(
            op,
            (n_in, shape[1]),
            self.origin(weight, index),
            lambda: self.origin(*source),
            shape,
            value,
            node._saved_groups,
        )


def look(norm: nn.Module, input: Tensor) -> None:
    """Compare the layer that made ``input`` with the layer that ``norm`` is bound to; bind ``norm`` if it is not bound.

    Raises:
        InputError: the layers differ in what ``norm`` depends on, or no single layer made ``input``.
    """
    made = made_by(input)
    if made is None:
        _warn_if_never_seen(norm)
        return
    if made.is_layer and made.n_out != norm.num_channels:
        made = Producer(f"a view of the output of {made}")
    if not norm.is_bound():
        _bind(norm, made)
    elif norm.weight_layer is None:
        _compare_with_given(norm, made)
    elif norm.weight_layer != NO_LAYER:
        _compare(norm, made)


def _warn_if_never_seen(norm):
    if norm.follows_registration and not norm._looks:
        _warn_once(
            f"{module_path(norm)}: training does not show which layer makes the input of this {norm.norm_name()}. "
            f"It follows {norm.weight_layer} only because of the order of registration. gng_d2.bind_norms(model, "
            f"example_inputs) finds the layer"
        )


def _bind(norm, made):
    if not made.is_layer:
        raise norm.unbound_error(f"its input is made by {made}, which has no weight")
    if norm.weight_standardization:  # too late: its convolution has already run
        return
    norm.bind(made.n_in, str(made))
    _warn_once(
        "PracticalGroupNorm layers that met no weight layer when the model was built take their groups in this "
        "training step, from the layers that made their inputs. Training does not show frozen layers: their outputs "
        "look like inputs of the model. Copies of the model that were made earlier (EMA, replicas) are not bound. "
        "gng_d2.bind_norms(model, example_inputs), called before the copies are made, binds all norms, also behind "
        "frozen layers"
    )


def _compare_with_given(norm, made):
    if made.is_layer and made.n_in != norm.in_channels:
        path, layer = _paths(norm, made)
        _warn_once(
            f"{path}: this norm was given in_channels={norm.in_channels} and keeps it, but the layer that made its "
            f"input, {layer}, has {made.n_in}"
        )


@cache
def _warn_once(message):
    logging.getLogger(__name__).warning(message)


def _compare(norm, made):
    if made.n_in == norm.in_channels and not (norm.weight_standardization and _is_raw(made)):
        return
    groups = norm.groups_after(made.n_in or norm.num_channels)
    if groups == norm.num_groups and not norm.weight_standardization:
        return
    if not made.is_layer:
        why = ", which has no weight"
    elif made.n_in == norm.in_channels:
        why = ", whose weight is not standardized"
    else:
        why = f", for which it would have num_groups={groups}, not {norm.num_groups}" * (groups != norm.num_groups)
    path, found = _paths(norm, made)
    raise InputError(
        f"{path}: this {norm.norm_name()} was bound to {norm.weight_layer}, but its input is made by {found}{why}. "
        f"{MEND}"
    )


def _is_raw(made):
    """Whether its weight is a parameter that is not standardized. Filters of a single number never are."""
    return made.weight is not None and made.weight.variable.numel() > made.weight.variable.shape[0]


def _paths(norm, made):
    """The paths of ``norm`` and of what made its input, such as "neck.conv (Conv2d(512, 64))", where known."""
    for module in live_modules() if made.weight is not None else ():
        if any(p is made.weight.variable for p in vars(module).get("_parameters", {}).values()):
            layer = f"{module_path(module)} ({type(module).__name__}({made.n_in}, {made.n_out}))"
            return module_path(norm), layer
    return module_path(norm), str(made)
