"""Measured gradient ratio of each block of a model: weight layer, norm, and activation where there is one.

The paper's K is Var[dL/dx] / Var[dL/dx'] of a block from x to x'. In a real model the input of a block feeds
others too, so dL/dx is not the block's alone. What is measured here is: the gradient that reaches the block's
output in the model's own backward, and what of it the block passes to its input, its vector-Jacobian product.
"""

import copy
import itertools
import math
from collections import Counter
from typing import Callable, Dict, List, NamedTuple, Optional

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm

from gng_d2.analysis import norm_table
from gng_d2.data.loader import seed_everything
from gng_d2.groups import GROUP_CHOICES
from gng_d2.layers.binding import layer_shape, named_norms

__all__ = ["BlockGradients", "block_kind", "measure_blocks", "probe"]

# PyTorch's functions, without the underscore of those that work in place
ACTIVATIONS = {
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "prelu", "relu",
    "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh",
}  # fmt: skip


class BlockGradients(NamedTuple):
    """What a backward showed of a block.

    ``ratio``: Var[gradient passed to the input] / Var[gradient at the output], over all numbers of all the
    block's calls; None where the gradient is 0 or not finite. ``fan_out``: how many operations
    take the block's input on its way to the loss, the block among them. ``activation``: its name, for
    instance "relu", or None.
    """

    ratio: Optional[float]
    fan_out: int
    activation: Optional[str]


def measure_blocks(model: nn.Module, loss: Callable[[], Tensor]) -> Dict[str, BlockGradients]:
    """Run ``loss``, which runs ``model`` and returns a scalar, and its backward.

    Returns:
        Name of the norm -> its block, in the order in which they ran, where the loss depends on the block and the
        block's input takes a gradient.
    """
    calls: Dict[str, List[_Call]] = {}
    with _BlockTracer(model, calls), torch.enable_grad():
        total = loss()
    fan_out = _count_consumers(total)
    total.backward()
    return {
        name: BlockGradients(
            ratio=_ratio([c.passed for c in block], [c.received for c in block]),
            fan_out=max(fan_out[c.source] for c in block),
            activation=block[-1].activation,
        )
        for name, block in calls.items()
        if any(c.received for c in block)
    }


class _Call:
    """One run of a block, from the input of its layer on."""

    def __init__(self, input):
        self.source = input.grad_fn.next_functions[0]
        self.passed = _watch(input)
        self.received = self.activation = None


class _BlockTracer(TorchFunctionMode):
    """While active, follows each block of a model from its layer's input to its norm's or activation's output."""

    def __init__(self, model, calls):
        super().__init__()
        self.model, self.calls = model, calls
        self.waiting = {}  # weight layer -> its call, until the norm runs
        self.normed = WeakTensorKeyDictionary()  # output of a norm -> (its call, its version)
        self.hooks = []

    def __enter__(self):
        for name, norm, _, layer in named_norms(self.model):
            if layer is not None:
                self.hooks.append(layer.register_forward_pre_hook(self._before_layer))
                self.hooks.append(norm.register_forward_hook(self._after_norm(name, layer)))
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def _before_layer(self, layer, args):
        if torch.is_grad_enabled() and args[0].requires_grad:
            own = args[0].view_as(args[0])  # only this block takes it, so that its gradient is this block's alone
            self.waiting[layer] = _Call(own)
            return (own, *args[1:])

    def _after_norm(self, name, layer):
        def hook(norm, args, output):
            call = self.waiting.pop(layer, None)
            if call is not None:
                call.received = _watch(output)
                self.normed[output] = call, output._version
                self.calls.setdefault(name, []).append(call)

        return hook

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "").rstrip("_")
        call = None
        if name in ACTIVATIONS and args and isinstance(args[0], Tensor):
            call, version = self.normed.get(args[0], (None, None))
            if call is not None and args[0]._version != version:
                call = None  # something was added to it in place
        output = func(*args, **(kwargs or {}))
        if call is not None:
            call.received, call.activation = _watch(output), name
        return output


def _watch(tensor):
    """Fills the list that it returns with the (count, sum, sum of squares) of the gradient at ``tensor``, as it is
    now: what changes it in place later does not count."""
    moments = []

    def hook(gradient):
        if gradient.numel():  # a head may get no proposals
            wide = gradient.double()
            moments.append((wide.numel(), wide.sum().item(), wide.square().sum().item()))

    tensor.register_hook(hook)
    return moments


def _ratio(passed, received):
    before = _variance(received)
    ratio = _variance(passed) / before if before else float("nan")
    return ratio if math.isfinite(ratio) else None


def _variance(calls):
    count, total, squares = (sum(column) for column in zip(*itertools.chain.from_iterable(calls)))
    return squares / count - (total / count) ** 2


def _count_consumers(loss):
    """How many inputs of operations on the way to ``loss`` each (node, output of it) is."""
    consumers, stack, seen = Counter(), [loss.grad_fn], {loss.grad_fn}
    while stack:
        for edge in stack.pop().next_functions:
            consumers[edge] += 1
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    return consumers


def probe(model: nn.Module, batch: List[Dict], seed: int = 0) -> List[Dict]:
    """The blocks of a Detectron2 model on a training batch, as configured and with the groups of GN (32), GN1 and PGN.

    The weights stay the same, and norms that have no groups stay as they are. Each setup is a model of its own, whose
    gradients come from its own loss. What a model draws at random (proposals) has the same seed in each.

    Returns:
        A row for each setup ("configured", "GN", "GN1", "PGN") and block that the loss depends on, in the order in
        which they run. Keys: ``setup``, ``name`` of the norm, ``norm``: what was configured, ``n_in``, ``n_out``,
        ``num_groups``, ``kernel_size``, ``stride``, ``fan_out`` and ``activation`` (:class:`BlockGradients`),
        ``paper`` (K, None without groups), ``measured`` (the ratio of :class:`BlockGradients`). A setup has no row for
        a norm whose channels its groups do not divide; that norm keeps its configured groups.
    """
    model = copy.deepcopy(model).train().requires_grad_(False)
    norms = {name: (norm, layer) for name, norm, _, layer in named_norms(model) if layer is not None}
    configured = {row["name"]: row for row in norm_table(model)}
    setups = {"configured": {name: configured[name]["num_groups"] for name in norms}, **_other_groups(norms)}
    rows, measured = [], {}  # measured: groups of all norms -> blocks
    for setup, groups in tqdm(setups.items(), unit="setup"):
        for name, (norm, _) in norms.items():
            if isinstance(norm, nn.GroupNorm):
                norm.num_groups = groups.get(name, configured[name]["num_groups"])
        table = {row["name"]: row for row in norm_table(model)}
        key = tuple(row["num_groups"] for row in table.values())
        if key not in measured:
            measured[key] = measure_blocks(model, lambda: _loss(model, batch, seed))
        for name, block in measured[key].items():
            if name in groups:
                about = {**table[name], "norm": configured[name]["norm"]}
                rows.append(_row(setup, about, norms[name][1], block))
    return rows


def _other_groups(norms):
    """Setup -> name of a group norm -> groups, where they divide its channels."""
    shapes = {name: layer_shape(layer) for name, (norm, layer) in norms.items() if isinstance(norm, nn.GroupNorm)}
    return {
        setup: {name: choose(*shape) for name, shape in shapes.items() if choose(*shape)}
        for setup, choose in GROUP_CHOICES.items()
    }


def _loss(model, batch, seed):
    seed_everything(seed)
    # The images take a gradient, so that one reaches the stem, and passes frozen layers.
    images = [{**record, "image": record["image"].float().requires_grad_()} for record in batch]
    with EventStorage():
        return sum(model(images).values())


def _row(setup, about, layer, block):
    return {
        "setup": setup,
        **{key: about[key] for key in ("name", "norm", "n_in", "n_out", "num_groups")},
        "kernel_size": getattr(layer, "kernel_size", (1,))[0],
        "stride": getattr(layer, "stride", (1,))[0],
        "fan_out": block.fan_out,
        "activation": block.activation,
        "paper": about["isometry_ratio"],
        "measured": block.ratio,
    }


def block_kind(row: Dict) -> str:
    """What sets a row of :func:`probe` apart from the paper's unit block."""
    if row["stride"] > 1:
        return "stride above 1"
    if not row["activation"]:
        return "no activation"
    return "shared input" if row["fan_out"] > 1 else "unit block as the paper has it"
