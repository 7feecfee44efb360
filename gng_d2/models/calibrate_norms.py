"""Fit the affines of group norms that replace a trained network's batch norms."""

import logging
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from threading import current_thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gng_d2.errors import InputError, abbreviated
from gng_d2.layers import GroupNorm, LearnedGroupNorm
from gng_d2.layers.kinds import num_channels
from gng_d2.layers.running import unchanged, uncompiled
from gng_d2.ops.learned_group_norm import learned_group_norm

from .passes import Pass, run_in_step

FEWEST_NUMBERS = 16  # a norm that saw fewer numbers of a channel keeps its affine
SMALLEST_DEVIATION = 1e-3  # a normalized channel with a smaller deviation has no signal that a weight could restore
LARGEST_WEIGHT = 10  # as a multiple of the largest weight of the reference's norm


def calibrate_norms(model: nn.Module, reference: nn.Module, inputs: Any) -> nn.Module:
    """Give the group norms of ``model`` the affine with which they replace the norms of ``reference``, in place.

    It is for a network that was trained with batch norm and whose norms are group norms now
    (:func:`~gng_d2.convert_norms`). Both networks run on the same unlabelled images, side by side. When they reach a
    norm, the group norm gets the weight and bias with which each channel of its output has the mean and the deviation
    that it has in ``reference``, and the run goes on with that output. Nothing is trained.

    Both networks run in eval mode, without gradients and without autocast. Afterwards only the values of the affines
    have changed: they stay the same parameters, and frozen ones stay frozen. A group norm keeps its affine, and the log
    lists it, if ``reference`` has no norm of its name or too few numbers reach it. A channel without signal after the
    group norm gets weight 0 and, as its bias, the reference's mean. No weight is larger than 10 times the largest
    weight of the reference's norm, and a weight that is 0 in ``reference`` is 0.

    Each norm then has an attribute ``calibration_error``, which :func:`~gng_d2.norm_table` shows. It is how far the
    norm's output is from the reference's, in deviations of the reference's output: 0 where they are equal, 1.4 where
    they have nothing in common. So it shows at which norm a network was lost.

    Args:
        model: its group norms are of :class:`torch.nn.GroupNorm` or a class that extends it.
        reference: the same network with its old norms and trained weights. Norms are matched by their names, so a
            network whose weights are permuted under the same names cannot be told from the right one.
        inputs: a batch (a tensor, a dict of keyword arguments, Detectron2's list of dicts), or an iterable of batches,
            each as :func:`~gng_d2.bind_norms` takes it: ``[(a, b)]`` is one batch for a model with two arguments.
            Several batches count as one, and what is live in the forward passes of all of them is in memory at the
            same time. Images of different sizes belong in different batches, because padding would be counted.

    Returns:
        ``model``.

    Raises:
        InputError: the networks differ in more than their norms, a group norm shares a parameter with another norm, or
            the networks cannot be run with ``inputs``. The affines are then unchanged.

    Examples::
        >>> reference = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> model = nn.Sequential(reference[0], GroupNorm(2, 8))
        >>> images = torch.randn(4, 3, 9, 9)
        >>> mean = calibrate_norms(model, reference, images)(images).mean()
        >>> torch.allclose(mean, reference.eval()(images).mean(), atol=1e-6)
        True
    """
    if isinstance(inputs, (Tensor, dict)) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], dict)):
        inputs = [inputs]
    if not isinstance(inputs, Iterable):
        raise InputError(f"calibrate_norms: inputs is {inputs!r}: give images, a batch or an iterable of batches")
    return calibrate(model, reference, inputs)


@torch.no_grad()
def calibrate(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], without: Collection[str] = ()
) -> nn.Module:
    """:func:`calibrate_norms` on ``batches``, as if ``reference`` had no norms with the names ``without``."""
    model, reference = uncompiled(model), uncompiled(reference)
    pairs = _pairs(model, reference, without)
    batches = list(batches)
    if not batches:
        raise InputError("calibrate_norms: inputs has no batch")
    before = [(p, p.clone()) for pair in pairs.values() for p in pair.norm.parameters(recurse=False)]
    try:
        _sweep(pairs, model, reference, batches)
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise
    for name, norm in model.named_modules():
        if isinstance(norm, nn.GroupNorm):
            norm.calibration_error = pairs[name].error if name in pairs else None
    _report(pairs, model)
    return model


def _pairs(model, reference, without):
    """The group norms of ``model`` with their counterparts, by their names."""
    modules = dict(model.named_modules())
    norms = {name: norm for name, norm in modules.items() if isinstance(norm, nn.GroupNorm)}
    references = {name: m for name, m in reference.named_modules() if num_channels(m) and name not in without}
    for name, norm in reference.named_modules():
        if type(norm).__name__ == "CycleBatchNormList" and name in norms:  # Detectron2's: several, used in turn
            references = {n: m for n, m in references.items() if m not in set(norm)} | {name: norm}
    lacking = [name for name in references if num_channels(modules.get(name, nn.Identity())) is None]
    if lacking or not norms.keys() & references.keys():
        raise InputError(
            f"calibrate_norms(model, reference, inputs): they are not the same network with other norms. Norms of the "
            f"reference: {_three(references)}. Of them the model lacks: {_three(lacking)}. Group norms of the model: "
            f"{_three(norms)}" + ". Convert the model first (convert_norms), or swap the two" * (not norms)
        )
    pairs = {name: _Pair(name, norm, references[name]) for name, norm in norms.items() if name in references}
    for pair in pairs.values():
        if isinstance(pair.norm, GroupNorm) and not pair.norm.is_bound():
            raise pair.norm.unbound_error()
    if any(p.is_meta for network in (model, reference) for p in network.parameters()):
        raise InputError("calibrate_norms: a network is on the meta device. Load its weights first")
    _check_affines(pairs, set(reference.parameters()))
    return pairs


def _check_affines(pairs, of_reference):
    """See that no two norms share a parameter."""
    owners: dict[nn.Parameter, str] = {}
    for name, pair in pairs.items():
        if pair.norm is pair.reference or not of_reference.isdisjoint(pair.norm.parameters(recurse=False)):
            raise InputError(f"calibrate_norms: model and reference share the norm {name}. Copy the model first")
        for parameter in (p for p in pair.own_affine() if p is not None):
            if owners.setdefault(parameter, name) != name:
                raise InputError(
                    f"calibrate_norms: the norms {owners[parameter]} and {name} share a parameter, but each needs an "
                    f"affine of its own. Give {name} a copy of the parameter first"
                )


def _three(names):
    return abbreviated(names, most=3) or "none"


def _sweep(pairs, model, reference, batches):
    """Run all batches until no affine changes any more.

    One sweep is enough unless a norm is used several times. Such a norm gets its affine at the end of a sweep, when the
    norms after it have seen outputs of its old affine.
    """
    for _ in range(2 + len(pairs)):
        with ExitStack() as stack:
            for network in (model, reference):
                stack.enter_context(unchanged(network))
                network.eval()
            for pair in pairs.values():
                pair.sums = None
                for hook in pair.add_hooks():
                    stack.callback(hook.remove)
            run_in_step(model, reference, batches, lambda name, passes: pairs[name].take(passes))
        if not any([pair.settle() for pair in pairs.values() if pair.is_repeated]):
            break


class _Pair:
    """A group norm, and the norm whose place it takes."""

    def __init__(self, name: str, norm: nn.GroupNorm, reference: nn.Module):
        self.name, self.norm, self.reference = name, norm, reference
        self.is_repeated = False  # whether one pass, or separate passes, reach it several times
        self.dead = 0  # the number of channels without signal
        self.error: float | None = None
        self.sums: Tensor | None = None  # what _sums returns, added up over the calls of this sweep
        self._smallest = SMALLEST_DEVIATION

    def add_hooks(self):
        """Have passes stop with the norm's input, and with the reference's output before timm's dropout and act."""

        def stop(tensor):
            if isinstance(current_thread(), Pass):
                current_thread().stop(self.name, tensor)

        yield self.norm.register_forward_pre_hook(
            lambda _, args, kwargs: stop(*args, *kwargs.values()), with_kwargs=True
        )
        inner = self.reference._modules
        if "act" in inner:
            first = inner.get("drop", inner["act"])  # timm has drop since 0.6
            yield first.register_forward_pre_hook(lambda _, args: stop(*args))
        else:
            # before hooks of the user's, which the norm of the model has too
            yield self.reference.register_forward_hook(lambda _, args, output: stop(output), prepend=True)

    def take(self, passes: list[tuple[Pass, Pass]]) -> None:
        """Take the norm's input and the reference's output from passes that have stopped there."""
        self.is_repeated = self.is_repeated or self.sums is not None
        for model, reference in passes:
            input, output = model.tensor, reference.tensor
            if input.shape != output.shape:
                raise InputError(
                    f"calibrate_norms: {self.name} gives {tuple(output.shape)} in the reference and takes "
                    f"{tuple(input.shape)} in the model. Both must be the same network"
                )
            if input.numel() == 0:  # of the boxes in an image without any, say
                continue
            if input.numel() == self.norm.num_groups:
                raise InputError(
                    f"calibrate_norms: the input {tuple(input.shape)} of {self.name} has one number in each group. "
                    f"Give larger images"
                )
            sums = _sums(_normalized(self.norm, input.double()), output.to(input.device, torch.float64))
            self.sums = sums if self.sums is None else self.sums + sums
            self._smallest = max(SMALLEST_DEVIATION, torch.finfo(input.dtype).eps)
        if self.sums is None:
            return
        if not self.sums.isfinite().all():
            raise InputError(f"calibrate_norms: the input or output of {self.name} has NaN or infinite numbers")
        if not self.is_repeated:
            self.settle()

    def why_left(self) -> str | None:
        if self.sums is None:
            return "were not reached by inputs"
        if None in self.own_affine():
            return "have no weight and bias of their own"
        return f"saw fewer than {FEWEST_NUMBERS} numbers in a channel" if self.sums[0, 0] < FEWEST_NUMBERS else None

    def settle(self) -> bool:
        """Write the affine that follows from the sums, and return whether it changed."""
        before = self._effective_affine()
        if self.why_left() is None:
            for parameter, value in zip(self.own_affine(), self._fitted_affine()):
                parameter.copy_(value)
        after = self._effective_affine()
        self.error = _relative_error(self.sums, *after)
        return not all(torch.allclose(a, b, 1e-4, 1e-4) for a, b in zip(before, after))

    def own_affine(self):
        """The parameters weight and bias, each None if there is none, or if it is computed."""
        return [self.norm._parameters.get(name) for name in ("weight", "bias")]

    def _effective_affine(self):
        values = [getattr(self.norm, name, None) for name in ("weight", "bias")]
        return [
            torch.full_like(self.sums[0], missing) if value is None else value.to(self.sums, copy=True)
            for value, missing in zip(values, (1, 0))
        ]

    def _fitted_affine(self):
        (_, x, y), (x_std, y_std) = _means(self.sums), _deviations(self.sums)
        gamma = getattr(self.reference, "weight", None)
        gamma = torch.ones_like(x) if gamma is None else gamma.to(x)
        is_dead = x_std < self._smallest
        self.dead = int((is_dead & (gamma != 0)).sum())
        limit = LARGEST_WEIGHT * gamma.abs().max()
        weight = torch.where(is_dead, 0, gamma.sign() * (y_std / x_std.clamp(min=self._smallest)).clamp(max=limit))
        return weight, y - weight * x


def _normalized(norm, x):
    """What ``norm`` makes of x without its affine."""
    if isinstance(norm, LearnedGroupNorm):
        return learned_group_norm(x, norm.weights(), eps=norm.eps)
    return F.group_norm(x, norm.num_groups, eps=norm.eps)


def _sums(x, y):
    """For each channel of (N, C, ...): the number of its values, and the sums of x, y, x^2, y^2 and x y."""
    x, y = (t.reshape(*t.shape[:2], -1).transpose(0, 1).flatten(1) for t in (x, y))
    number = torch.full_like(x[:, 0], x.shape[1])
    return torch.stack([number, x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)])


def _means(sums):
    return sums[:3] / sums[0]


def _deviations(sums):
    return (sums[3:5] / sums[0] - _means(sums)[1:] ** 2).clamp(min=0).sqrt()


def _relative_error(sums, weight, bias):
    """The root mean square of weight x + bias - y, in deviations of y."""
    number, x, y, xx, yy, xy = sums
    squares = weight**2 * xx + yy + number * bias**2 + 2 * (weight * bias * x - weight * xy - bias * y)
    spread = (number * _deviations(sums)[1] ** 2).sum()
    return (squares.sum().clamp(min=0) / spread).sqrt().item() if spread > 0 else 0.0


def _report(pairs, model):
    """Say in one line what was calibrated, what was not, and where little of the reference is left."""
    listed: dict[str, list[str]] = {}
    for name, norm in model.named_modules():
        if isinstance(norm, nn.GroupNorm):
            why = pairs[name].why_left() if name in pairs else "have no counterpart in the reference"
            listed.setdefault(why, []).append(name)
    errors = [(pairs[name].error, name) for name in listed.pop(None, [])]
    dead = [f"{pair.name} ({pair.dead})" for pair in pairs.values() if pair.dead]
    listed["have channels without signal, whose weight is 0"] = dead
    listed["follow a standardized convolution, after which little of the reference is left"] = [
        name
        for name, pair in pairs.items()
        if getattr(pair.norm, "weight_standardization", False)
        and not getattr(pair.reference, "weight_standardization", False)
    ]
    said = [f"{len(errors)} norms are calibrated"]
    if errors:
        (smallest, _), (largest, _), (last, name) = min(errors), max(errors), errors[-1]
        said[0] += f", relative error {smallest:.2f} to {largest:.2f}, {last:.2f} in {name}"
    left = [f"{len(names)} {why} ({_three(names)})" for why, names in listed.items() if names]
    level = logging.WARNING if left or not errors else logging.INFO
    logging.getLogger(__name__).log(level, "calibrate_norms: %s", "; ".join(said + left))
