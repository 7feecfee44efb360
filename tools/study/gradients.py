"""How each block of a real model changes the variance of the gradient, beside the paper's K.

    tools/reproduce.py gradients --config-file configs/faster_rcnn_pgn_ws.yaml --plot gradients.png \\
        MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0 INPUT.MIN_SIZE_TRAIN '(320,)'

One batch of DATASETS.TRAIN (looked for in $DETECTRON2_DATASETS), the model's own loss, one backward for each of:
the model as configured, and the same weights with the groups of GN (32), GN1 and PGN. A block is a weight layer, its
norm, and the activation that follows at once, if one does. Weights are MODEL.WEIGHTS, or the initialization where
that is ''.

measured  Var[dL/dx] / Var[dL/dx'] from the block's input x to its output x'. In a real model x feeds other blocks
          too, so what counts is the gradient that the model's own backward brings to x', and what of it this block
          alone passes to x: its vector-Jacobian product
K         the paper's, which supposes stride 1, ReLU before and after, and an input that feeds nothing else. A
          stride of s divides the measured ratio by about s^2; fan_out counts what the block's input feeds
"""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import quantiles

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm

from command_line import add_import, add_outputs, add_overrides, add_trust, count
from gng_d2.errors import InputError
from gng_d2.groups import GROUP_CHOICES
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import check_config, check_weights, load_config
from gng_d2.job.data.checks import prepare_datasets
from gng_d2.job.data.loader import build_train_loader, seed_everything
from gng_d2.job.files import prepare_outputs, save_figure
from gng_d2.job.imports import import_modules
from gng_d2.layers.binding import named_norms
from gng_d2.layers.kinds import layer_shape
from gng_d2.models.norm_table import norm_table

from .rows import machine, markdown, write_rows

# PyTorch's functions, without the underscore of those that work in place
ACTIVATION_FUNCTIONS = {
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "prelu", "relu",
    "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh",
}  # fmt: skip


@dataclass(frozen=True)
class BlockGradients:
    """What a backward showed of a block."""

    # Var[gradient passed to the input] / Var[gradient at the output], over all numbers of all the block's calls;
    # None where the gradient is 0 or not finite
    ratio: float | None
    fan_out: int  # how many operations take the block's input on its way to the loss, the block among them
    activation: str | None  # its name, for instance "relu"


@dataclass(frozen=True)
class GradientRow:
    """A block under one choice of groups."""

    setup: str  # "configured", "GN", "GN1" or "PGN"
    name: str  # of the norm
    norm: str  # what was configured
    n_in: int
    n_out: int
    num_groups: int | None
    kernel_size: int
    stride: int
    fan_out: int  # see BlockGradients
    activation: str | None
    paper: float | None  # K, None without groups
    measured: float | None  # BlockGradients.ratio
    machine: str

    @property
    def kind(self) -> str:
        """What sets the block apart from the paper's."""
        if self.stride > 1:
            return "stride above 1"
        if not self.activation:
            return "no activation"
        return "shared input" if self.fan_out > 1 else UNIT_BLOCK


UNIT_BLOCK = "unit block as the paper has it"


def measure_blocks(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, BlockGradients]:
    """Measure the blocks of ``model`` in one run of ``loss``, which runs it and returns a scalar, and its backward.

    Returns:
        By the name of the norm its block, in the order in which they ran, where the loss depends on the block and the
        block's input takes a gradient.
    """
    calls: dict[str, list[_Call]] = {}
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
        if name in ACTIVATION_FUNCTIONS and args and isinstance(args[0], Tensor):
            call, version = self.normed.get(args[0], (None, None))
            if call is not None and args[0]._version != version:
                call = None  # something was added to it in place
        output = func(*args, **(kwargs or {}))
        if call is not None:
            call.received, call.activation = _watch(output), name
        return output


def _watch(tensor):
    """A list that the backward fills with the (count, sum, sum of squares) of the gradient at ``tensor``, as it is
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


def measure(model: nn.Module, batch: list[dict], seed: int = 0, device: str = "cpu") -> list[GradientRow]:
    """Measure a Detectron2 model on a training batch, as configured and with the groups of GN (32), GN1 and PGN.

    The weights stay the same, and norms that have no groups stay as they are. Each setup is a model of its own, whose
    gradients come from its own loss. What a model draws at random (proposals) has the same seed in each.

    Returns:
        A row for each setup and block that the loss depends on, in the order in which they run. A setup has no row for
        a norm whose channels its groups do not divide; that norm keeps its configured groups.
    """
    model = copy.deepcopy(model).train().requires_grad_(False)
    norms = {name: (norm, layer) for name, norm, _, layer in named_norms(model) if layer is not None}
    configured = {row.name: row for row in norm_table(model)}
    setups = {"configured": {name: configured[name].num_groups for name in norms}, **_other_groups(norms)}
    rows, measured = [], {}  # measured: groups of all norms -> blocks
    for setup, groups in tqdm(setups.items(), unit="setup"):
        for name, (norm, _) in norms.items():
            if _has_groups(norm):
                norm.num_groups = groups.get(name, configured[name].num_groups)
        table = {row.name: row for row in norm_table(model)}
        key = tuple(row.num_groups for row in table.values())
        if key not in measured:
            measured[key] = measure_blocks(model, lambda: _loss(model, batch, seed))
        for name, block in measured[key].items():
            if name in groups:
                about = replace(table[name], norm=configured[name].norm)
                rows.append(_row(setup, about, norms[name][1], block, machine(device)))
    return rows


def _has_groups(norm):
    return isinstance(norm, nn.GroupNorm) and norm.num_groups is not None  # LGN has groups of all sizes


def _other_groups(norms):
    """Setup -> name of a group norm -> groups, where they divide its channels."""
    shapes = {name: layer_shape(layer) for name, (norm, layer) in norms.items() if _has_groups(norm)}
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


def _row(setup, about, layer, block, measured_on):
    return GradientRow(
        setup=setup,
        **{key: getattr(about, key) for key in ("name", "norm", "n_in", "n_out", "num_groups")},
        kernel_size=getattr(layer, "kernel_size", (1,))[0],
        stride=getattr(layer, "stride", (1,))[0],
        fan_out=block.fan_out,
        activation=block.activation,
        paper=about.isometry_ratio,
        measured=block.ratio,
        machine=measured_on,
    )


def table(rows: list[GradientRow]) -> str:
    """Medians and quartiles over blocks of a kind, under each choice of groups: the blocks themselves are many."""
    lines = []
    for kind in dict.fromkeys(row.kind for row in sorted(rows, key=lambda row: row.kind != UNIT_BLOCK)):
        for setup in GROUP_CHOICES:
            blocks = [row for row in rows if row.setup == setup and row.kind == kind and row.measured and row.paper]
            if blocks:
                cells = [_quartiles([row.paper for row in blocks]), _quartiles([row.measured for row in blocks])]
                lines.append([kind, setup, len(blocks), *cells])
    return markdown(lines, ["block", "groups", "how many", "paper's K (quartiles)", "measured (quartiles)"])


def _quartiles(values):
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else 3 * values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def block_table(rows: list[GradientRow]) -> str:
    """A line for each block, with a column for each setup, and below what has no figure."""
    setups = list(dict.fromkeys(row.setup for row in rows))
    blocks = {}
    for row in rows:
        ratios = [f"{ratio:.3f}" if ratio is not None else "-" for ratio in (row.measured, row.paper)]
        blocks.setdefault(row.name, {})[row.setup] = f"{row.num_groups or '-'}: {ratios[0]} ({ratios[1]})"
    about = {row.name: asdict(row) for row in rows}
    keys = ("n_in", "n_out", "kernel_size", "stride", "fan_out", "activation")
    lines = [
        [name, *(about[name][key] for key in keys), *(cells.get(setup) for setup in setups)]
        for name, cells in blocks.items()
    ]
    text = [markdown(lines, ["norm", *keys, *setups]), "", "under each setup: groups: measured (K)"]
    for setup in setups:
        skipped = sorted(name for name, cells in blocks.items() if setup not in cells)
        if skipped:
            text.append(f"{setup}: no figure for {', '.join(skipped)}: no group norm, or its channels do not divide")
    return "\n".join(text)


_MARKERS = {
    UNIT_BLOCK: {"marker": "o", "ms": 5},
    "shared input": {"marker": "o", "ms": 4, "mfc": "none"},
    "no activation": {"marker": "s", "ms": 4, "mfc": "none"},
    "stride above 1": {"marker": "v", "ms": 4, "mfc": "none"},
}


def plot(rows: list[GradientRow], path: str) -> None:
    """Draw the measured ratio and the paper's K along the depth of the model, a panel for each setup with groups of
    its own."""
    names = list(dict.fromkeys(row.name for row in rows))
    setups = {}  # by their groups: the configured model may be one of the others
    for setup in dict.fromkeys(row.setup for row in rows):
        shown = [row for row in rows if row.setup == setup]
        setups.setdefault(tuple((row.name, row.num_groups) for row in shown), {})[setup] = shown
    figure = Figure(figsize=(max(8, 0.15 * len(names)), 2.2 * len(setups) + 1.6), layout="constrained")
    panels = figure.subplots(len(setups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for same, axes in zip(setups.values(), panels):
        _plot_setup(axes, next(iter(same.values())), names)
        axes.set_ylabel(f"{', '.join(same)}\ngradient ratio")
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    panels[-1].set_xticks(range(len(names)), [name.removesuffix(".norm") for name in names], rotation=90, fontsize=6)
    save_figure(figure, path, dpi=100)


def _plot_setup(axes, rows, names):
    paper = [(names.index(row.name), row.paper) for row in rows if row.paper]
    if paper:
        axes.plot(*zip(*paper), "_", color="C3", mew=2, ms=7, label="paper's K")
    for kind, marker in _MARKERS.items():
        points = [(names.index(row.name), row.measured) for row in rows if row.measured and row.kind == kind]
        if points:
            axes.plot(*zip(*points), color="C0", ls="", **marker, label=f"measured, {kind}")
    axes.axhline(1, color="0.5", lw=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")


def add_arguments(parser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a path, or a name in Detectron2's zoo")
    add_outputs(
        parser,
        json="write a row for each setup and block",
        plot="draw measured and K along the depth, a panel for each setup",
    )
    parser.add_argument(
        "--images", type=count, default=4, metavar="N", help="images of the batch; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and proposals; default: %(default)s")
    add_import(parser)
    add_trust(parser)
    add_overrides(parser)


def main(args) -> None:
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: a seed is 0 or more")
    import_modules(args.imports)
    cfg = load_config(args.config_file, args.opts)
    cfg.merge_from_list(["DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", args.images, "SOLVER.REFERENCE_WORLD_SIZE", 0, "SEED", args.seed])
    check_config(cfg)
    check_weights(cfg)
    prepare_datasets(cfg)
    prepare_outputs(args.json, args.plot)
    seed_everything(args.seed)
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    rows = measure(model, next(iter(build_train_loader(cfg))), args.seed, cfg.MODEL.DEVICE)
    write_rows(args.json, rows)
    if args.plot:
        plot(rows, args.plot)
    print(f"{block_table(rows)}\n\n{table(rows)}")
