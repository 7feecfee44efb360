"""Ways to run a module: any set of them on one original class, whatever the order in which they came."""

import copy
import pickle
from itertools import permutations

import pytest
import torch
from detectron2.layers import Conv2d
from needs import PARAMETRIZED_WEIGHT_NORM
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from gng_d2 import WSConv2d
from gng_d2.errors import InputError
from gng_d2.layers.class_change import StandIn, add, has, original_class, remove
from gng_d2.layers.ws_conv import standardize, unstandardize
from gng_d2.ops import standardize_weight


class Fused(StandIn):
    order = 1

    @classmethod
    def method_of(cls, wrapped):
        return "forward"

    def run(self, method, args, kwargs):
        return method(*args, **kwargs) + 1


class Recomputed(StandIn):
    order = 2
    method_of = Fused.method_of

    def run(self, method, args, kwargs):
        return method(*args, **kwargs) * 2


def on(module, way):
    standardize(module, "GN+WS") if way is WSConv2d else add(module, way)


def off(module, way):
    unstandardize(module) if way is WSConv2d else remove(module, way)


WAYS = WSConv2d, Fused, Recomputed
PLAIN = {nn.Conv2d: {}, Conv2d: {"activation": nn.ReLU()}}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("order", permutations(WAYS))
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_in_any_order_on_and_off(kind, order, copied):
    module, x = kind(3, 4, 3, **PLAIN[kind]), torch.randn(1, 3, 5, 5)
    expected = nn.functional.conv2d(x, standardize_weight(module.weight), module.bias)
    expected = 2 * ((expected.relu() if PLAIN[kind] else expected) + 1)
    state, plain = set(vars(module)), module(x)
    for way in order:
        on(module, way)
    module = copied(module)
    assert type(module).__name__ == "RecomputedFusedWSConv2d" and isinstance(module, WSConv2d)
    assert original_class(module) is kind and all(has(module, way) for way in WAYS)
    torch.testing.assert_close(module(x), expected)
    for removed in permutations(WAYS):
        again = copy.deepcopy(module)
        for number, way in enumerate(removed):
            off(again, way)
            assert [has(again, way) for way in removed] == [False] * (number + 1) + [True] * (2 - number)
        assert type(again) is kind and set(vars(again)) == state and torch.equal(again(x), plain)


def test_the_class_is_the_same_whatever_the_order_and_is_made_once():
    modules = [nn.Conv2d(3, 4, 3) for _ in range(6)]
    for module, order in zip(modules, permutations(WAYS)):
        for way in (*order, order[0]):  # once more changes nothing
            on(module, way)
    assert len({type(module) for module in modules}) == 1


class Other(WSConv2d):
    """Its forward may be another, so it runs in no way that could be removed."""

    way = 5


@pytest.mark.parametrize("make", [lambda: Other(3, 4, 3), lambda: nn.ReLU()])
def test_a_class_of_ones_own_is_its_original(make):
    module = make()
    kind = type(module)
    assert original_class(module) is kind and not has(module, WSConv2d)
    add(module, Fused)
    assert original_class(module) is kind and type(copy.deepcopy(module)) is type(module)
    remove(module, Fused)
    remove(module, Recomputed)  # which it has not
    assert type(module) is kind


def test_what_no_plain_convolution_computes_stays_standardized():
    layer = WSConv2d(3, 4, 3, padding=1, padding_mode="reflect", norm=nn.GroupNorm(2, 4))
    add(layer, Fused)
    remove(layer, WSConv2d)
    assert original_class(layer) is WSConv2d and has(layer, WSConv2d) and has(layer, Fused)


@PARAMETRIZED_WEIGHT_NORM
def test_below_a_subclass_that_pytorch_put_on_top_the_ways_are_seen_and_stay():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    for way in WAYS:
        on(layer, way)
    before = layer(x)
    parametrizations.weight_norm(layer)
    assert original_class(layer) is nn.Conv2d and all(has(layer, way) for way in WAYS)
    torch.testing.assert_close(layer(x), before)
    for change in (add, remove):
        with pytest.raises(InputError, match="cannot be changed.* is ParametrizedRecomputedFused.*before torch"):
            change(layer, Fused)
    parametrize.remove_parametrizations(layer, "weight")
    for way in WAYS:
        off(layer, way)
    assert type(layer) is nn.Conv2d
