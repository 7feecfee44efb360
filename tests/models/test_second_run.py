"""A block whose norms are computed again: its second run finds what the first one found, or is refused."""

import io
import itertools
import random
from collections import Counter, OrderedDict
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from chains import chain, images
from needs import RECOMPUTE
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from gng_d2 import GroupNorm, recompute_norms
from gng_d2.errors import InputError
from gng_d2.ops import set_kernels_enabled

pytestmark = [pytest.mark.slow, RECOMPUTE]


class Block(nn.Module):
    """A block of a user's own, named in a model; ``scale`` gives it something to compute with its output."""

    def __init__(self, scale):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), scale
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.seen, self.last = 0, [], None

    def forward(self, x, *more):
        return self.scale(self, self.norm(self.conv(x)).abs(), *more).sigmoid()


def as_it_is(block, x):
    return x


def make_attribute(block):
    """The buffer becomes a tensor that the module knows nothing of."""
    del block.steps
    block.steps = torch.zeros(())


# what it finds


def count(block, x):
    block.calls += 1
    return x * block.calls


def step_on(block, x):
    block.steps = block.steps * 0.5 + 1
    return x * block.steps


def see(block, x):
    block.seen.append(len(block.seen))
    return x * len(block.seen)


def stash(block, x):
    block.last = x if block.last is None else 0.9 * block.last.detach() + x
    return block.last


def fill(block, x, features, named):
    features.append(x)
    named["last"] = x
    return x * len(features)


def empty(block, x, features, named):
    return x * features.pop() + named.pop("scale")


REPEATED = {
    "a counter": count,
    "a buffer reassigned": step_on,
    "a list of its own": see,
    "an average of tensors": stash,
    "the caller's list and dict": fill,
    "taken from the caller's": empty,
    "Python's random numbers": lambda block, x: x * random.random(),
    "NumPy's random numbers": lambda block, x: x * torch.from_numpy(np.random.rand(8, 1, 1)).float(),
    "dropout": lambda block, x: nn.functional.dropout(x, 0.5, block.training),
}
OF_THE_CALLER = {
    "the caller's list and dict": lambda: ([], {}),
    "taken from the caller's": lambda: ([1.0, torch.tensor(2.0)], {"scale": torch.tensor(0.5)}),
}


@pytest.mark.parametrize("case", REPEATED)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_second_run_finds_what_the_first_one_found(case, in_place):
    """Gradients, and all that the block or its caller keeps; also where the first step runs twice."""
    found = []
    for recomputed in (False, True):
        block, steps = Block(REPEATED[case]), []
        if in_place:
            block.conv = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.SiLU(True), nn.Conv2d(128, 8, 3))
        for p in block.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
        if recomputed:
            recompute_norms(block)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        for _ in range(3):
            args = OF_THE_CALLER.get(case, tuple)()
            loss = block.train()(images(size=8), *args).square().mean()
            block.eval()  # as where a model is evaluated before its loss goes backward
            steps.append([loss, *torch.autograd.grad(loss, list(block.parameters())), block.steps, block.last])
            steps[-1] += [*tree_flatten(args)[0], block.calls, *block.seen, random.random(), np.random.rand()]
        found.append(tree_flatten(steps)[0])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*found))


@pytest.mark.parametrize("kind", [Counter, OrderedDict])
def test_a_dict_of_another_kind_is_written_once(kind):
    def tally(block, x):
        block.seen["runs"] = block.seen.get("runs", 0) + 1
        block.seen[len(block.seen)] = 1
        return x

    model = recompute_norms(Block(tally))
    model.seen = kind(a=2)
    model(images()).mean().backward()
    assert list(model.seen.items()) == [("a", 2), ("runs", 1), (2, 1)]


def test_functional_call_computes_again_with_the_weights_that_it_was_called_with():
    block, x = Block(as_it_is), images(size=8)
    weights = {name: torch.randn_like(p, requires_grad=True) for name, p in block.named_parameters()}

    def gradients_of_weights():
        return torch.autograd.grad(functional_call(block, weights, x).square().mean(), list(weights.values()))

    expected = gradients_of_weights()
    recompute_norms(block)
    assert all(map(torch.equal, gradients_of_weights(), expected))


def test_the_switch_stands_as_it_stood_when_the_module_first_ran():
    model, inputs = chain(nn.Conv2d(128, 8, 1), GroupNorm(1, 8)), images(1, 192)
    expected, loss = {}, {}
    for name in ("kept", "recomputed"):
        with set_kernels_enabled("off"):
            loss[name] = model(inputs).square().mean()
        expected[name] = torch.autograd.grad(loss[name], list(model.parameters()))
        recompute_norms(model)
    assert all(map(torch.equal, expected["kept"], expected["recomputed"]))


# what it must compute again


def drawn_from(draw):
    return lambda block, x: x * draw()


def cut_to(draw):
    return lambda block, x: x[:, :, : draw()].clone()


DIFFERENT = {
    "an iterator": lambda: drawn_from(itertools.count(1).__next__),
    "a list that is emptied": lambda: drawn_from([1.0, 2.0, 3.0].pop),
    "a generator of its own": lambda: drawn_from(partial(torch.rand, 8, 1, 1, generator=torch.Generator())),
    "a generator of NumPy's": lambda: drawn_from(np.random.default_rng(0).random),
    "a generator of Python's": lambda: drawn_from(random.Random(0).random),
    "a mask": lambda: lambda block, x, own=torch.Generator(): x * (torch.rand(x.shape, generator=own) > 0.5),
    "a file": lambda: drawn_from(lambda file=io.StringIO("1\n2\n3\n"): float(file.readline())),
    "another shape": lambda: cut_to(itertools.count(3).__next__),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_run_that_computes_something_else_is_an_error_that_names_the_block(case, dtype):
    model = nn.ModuleDict({"stem": Block(DIFFERENT[case]())}).to(dtype)
    y = recompute_norms(model)["stem"](torch.randn(2, 3, 64, 64, dtype=dtype))
    with pytest.raises(InputError, match="^stem: its output is another one when it is computed again"):
        y.square().mean().backward()


def test_outputs_are_compared_in_the_first_runs_and_then_in_one_of_a_thousand():
    block = recompute_norms(Block(as_it_is))
    compared = [bool(block(images()[:1]).mean().backward()) or block._kept.runs for _ in range(2)]
    assert compared == [1, 2]
    for runs, differs in ((2, True), (3, False), (999, False), (1000, True), (2000, True)):
        block._kept.runs, block.scale = runs, drawn_from(itertools.count(1).__next__)
        loss = block(images()).mean()
        with pytest.raises(InputError) if differs else nullcontext():
            loss.backward()


def test_what_rounding_does_is_no_difference():
    """Values around zero, whose sum is nearly zero, in another order or with noise of their type's precision."""
    for dtype in (torch.float32, torch.bfloat16):
        noise = iter([0, torch.finfo(dtype).eps])
        block = Block(lambda block, x, noise=noise: (x + next(noise) * torch.randn_like(x)) * 4)
        recompute_norms(block.to(dtype))(torch.randn(2, 3, 16, 16, dtype=dtype)).mean().backward()


# what changed before it


def test_an_optimizer_that_steps_before_the_backward_pass_is_an_error():
    model, x = nn.ModuleDict({"stem": chain()}), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recompute_norms(model)["stem"](x).mean().backward()
    loss = model["stem"](x).mean()
    optimizer.step()
    with pytest.raises(InputError, match="^stem: its weights changed before the backward pass"):
        loss.backward()


@pytest.mark.parametrize("kind", ["buffer", "attribute", "list"])
def test_a_tensor_of_a_block_that_changes_before_the_backward_pass_is_an_error(kind):
    """Also in runs whose outputs are not compared. The addition keeps nothing, so that PyTorch alone allows it."""
    block = Block(lambda block, x: x + (block.seen[0] if kind == "list" else block.steps))
    if kind == "attribute":
        make_attribute(block)
    block.seen = [torch.zeros(())]
    model, x = recompute_norms(nn.ModuleDict({"stem": block})), images()
    for _ in range(4):
        model["stem"](x).mean().backward()
    loss = model["stem"](x).mean()
    (block.seen[0] if kind == "list" else block.steps).add_(5)
    with pytest.raises(InputError, match="^stem: its weights changed before the backward pass, or its buffers"):
        loss.backward()


def test_an_input_changed_in_place_is_an_error():
    model, inputs = recompute_norms(chain()), images()
    y = model(inputs)
    inputs.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_convolution_that_is_changed_in_place_later_is_an_error_that_names_the_block():
    class Changeable(nn.Sequential):
        def forward(self, x):
            y = self[1](self[0](x))
            return self[2](y.relu_() if self.changes else y.relu())

    model = nn.Sequential(nn.Identity(), Changeable(GroupNorm(2, 96), nn.Conv2d(96, 96, 3), GroupNorm(2, 96)))
    recompute_norms(model)
    for model[1].changes in (False, False):
        model(torch.randn(1, 96, 8, 8)).sum().backward()
    model[1].changes = True
    with pytest.raises(
        InputError, match=r"^1: the output of a convolution in it was changed in place, and.*enable=False"
    ):
        model(torch.randn(1, 96, 8, 8)).sum().backward()


# what cannot run twice


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)])
def test_a_module_that_changes_its_input_is_an_error(first):
    """With an input that needs no gradient, its gradients would be others without a word."""
    module = nn.Sequential(first, *chain())
    recompute_norms(module)
    for inputs in (images(), images().requires_grad_() * 1):
        with pytest.raises(InputError, match="changes its input in place.*inplace=False"):
            module(inputs)


def test_a_module_that_changes_its_buffers_is_an_error():
    def step_in_place(block, x):
        block.steps += 1
        return x * block.steps

    model = recompute_norms(Block(step_in_place))
    with pytest.raises(InputError, match="RecomputedBlock: running it changes its buffers"):
        model(images())
    make_attribute(model)
    with pytest.raises(InputError, match="RecomputedBlock: running it changes its buffers or other tensors"):
        model(images())


def test_a_block_that_takes_gradients_while_it_runs_is_named():
    def penalty(block, y):
        (slope,) = torch.autograd.grad(y.sum(), block.conv.weight, retain_graph=True)
        return y * slope.square().mean()

    model = recompute_norms(nn.ModuleDict({"stem": Block(penalty)}))
    with pytest.raises(InputError, match="stem: it takes gradients through itself while it runs"):
        model["stem"](images())


def test_a_second_backward_is_refused():
    model, inputs = recompute_norms(chain()), images()
    model(inputs)  # keeps nothing that could be used up
    loss = model(inputs).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Trying to backward an extra time"):
        loss.backward()
