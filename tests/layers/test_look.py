"""In training, a norm looks which layer made its input: no wrong binding stays silent."""

import copy
import pickle
import random
import re
from functools import partial

import pytest
import torch
from needs import LOOK
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gng_d2
from gng_d2 import GroupNorm, PracticalGroupNorm, WSConv2d, bind_norms, practical_num_groups
from gng_d2.errors import InputError
from gng_d2.layers.group_norm import LOOKS
from gng_d2.layers.look import _warn_once, made_by

pytestmark = LOOK


@pytest.fixture(autouse=True)
def warn_again():
    """What was said in another test is said again."""
    _warn_once.cache_clear()


pgn = PracticalGroupNorm
standardized = partial(PracticalGroupNorm, weight_standardization=True)


@pytest.fixture
def no_search(monkeypatch):
    """Messages without paths, for which all live objects are searched."""
    monkeypatch.setattr("gng_d2.layers.look.live_modules", list)
    monkeypatch.setattr("gng_d2.layers.module_path.live_modules", list)


class Net(nn.Module):
    """Children in the order given; ``run`` is its forward."""

    def __init__(self, run, **children):
        super().__init__()
        self.run = run
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def conv(n_in, n_out=8, **options):
    return nn.Conv2d(n_in, n_out, 1, **options)


def image(channels):
    return torch.randn(2, channels, 5, 5)


class LooksLikeALayer(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.in_channels, self.out_channels = 8, 8
        self.weight = nn.Parameter(torch.ones(8, 1, 1))
        self.conv = conv(64)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x)) * self.weight


def copied(norm):
    """A norm bound to 16 channels in a place with 64."""
    bound = nn.Sequential(conv(16), norm)[1]
    return nn.Sequential(conv(64), copy.deepcopy(bound))


def inserted(norm):
    model = nn.Sequential(conv(16), norm)
    model.insert(1, conv(8))
    return model


def deleted(norm):
    model = nn.Sequential(conv(16), conv(8), norm)
    del model[1]
    return model


def resized(norm):
    model = nn.Sequential(conv(64), norm)
    model[0].weight = nn.Parameter(model[0].weight[:, :16].detach())
    model[0].in_channels = 16
    return model


def with_side(side, run, side_input):
    """A layer of the same width registered between a convolution and its norm."""
    return lambda norm: (Net(run, conv=conv(64), side=side(), norm=norm), (image(64), side_input()))


def norm_first(self, x, y):
    return self.norm(self.conv(x)) + self.side(y)


def gated(self, x, y):
    h = self.norm(self.conv(x))
    return h * self.side(h.mean((2, 3)) if isinstance(self.side, nn.Linear) else h)[..., :1, :1].sigmoid()


def embedded_after(self, x, t):
    return self.norm(self.conv(x)) + self.side(t)[:, :, None, None]


WRONG = {
    "convs, then norms": lambda norm: (
        Net(
            lambda self, x: self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))),
            **{"conv1": conv(64), "conv2": conv(8), "bn1": norm, "bn2": pgn(8)},
        ),
        (image(64),),
    ),
    "shortcut": with_side(lambda: conv(8), norm_first, lambda: image(8)),
    "shortcut first": lambda norm: (
        Net(
            lambda self, x: self.norm(self.skip(x)) + self.conv2(F.relu(self.conv1(x))),
            **{"skip": conv(64), "conv1": conv(64, 16), "conv2": conv(16), "norm": norm},
        ),
        (image(64),),
    ),
    "squeeze-excite": with_side(lambda: conv(8), gated, lambda: image(8)),
    "FiLM": with_side(lambda: conv(16), lambda self, x, y: self.norm(self.conv(x)) * self.side(y), lambda: image(16)),
    "copied norm": lambda norm: (copied(norm), (image(64),)),
    "insert": lambda norm: (inserted(norm), (image(16),)),
    "delete": lambda norm: (deleted(norm), (image(16),)),
    "one norm in two places": lambda norm: (
        Net(
            lambda self, x: self.norm(self.b(F.relu(self.norm(self.a(x))))),
            **{"a": conv(64), "norm": norm, "b": conv(8)},
        ),
        (image(64),),
    ),
    "sizes changed": lambda norm: (resized(norm), (image(16),)),
    "dead layer": lambda norm: (
        Net(lambda self, x: self.norm(self.conv(x)), conv=conv(64), auxiliary=conv(16), norm=norm),
        (image(64),),
    ),
    "layer before the previous activation": lambda norm: (
        Net(lambda self, x: self.norm(F.relu(self.conv(x))), conv=conv(64), norm=norm),
        (image(64),),
    ),
    "after a sum": lambda norm: (
        Net(lambda self, x: self.norm(self.conv(x) + self.skip(x)), conv=conv(64), skip=conv(64), norm=norm),
        (image(64),),
    ),
}
# where what was taken for the layer cannot be standardized
WRONG_WITHOUT_WS = {
    "layer that looks like one": lambda norm: (LooksLikeALayer(norm), (image(64),)),
    "time embedding after": with_side(lambda: nn.Linear(16, 8), embedded_after, lambda: torch.randn(2, 16)),
    "squeeze-excite, linear": with_side(lambda: nn.Linear(8, 8), gated, lambda: image(8)),
}


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("name", [*WRONG, *WRONG_WITHOUT_WS])
def test_a_wrong_layer_is_an_error_in_training(name):
    model, inputs = {**WRONG, **WRONG_WITHOUT_WS}[name](pgn(8))
    assert gng_d2.unbound_norms(model) in ([], ["bn2"]), "bound, but wrongly"
    with pytest.raises(InputError, match=r"PGN was bound to .*its input is made by .*bind_norms"):
        model(*inputs)


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("norm", [standardized, partial(GroupNorm, 4, weight_standardization=True)])
@pytest.mark.parametrize("name", WRONG)
def test_another_standardized_layer_is_an_error_in_training(name, norm):
    model, inputs = WRONG[name](norm(8))
    with pytest.raises(InputError, match=r"\+WS was bound to .*its input is made by "):
        model(*inputs)


def test_a_standardized_twin_of_the_right_layer_is_an_error():
    """As many channels, so that only its raw weight tells."""
    model = Net(norm_first, conv=conv(8), side=conv(8), norm=standardized(8))
    assert type(model.side) is WSConv2d
    with pytest.raises(InputError, match=r"made by conv \(Conv2d\(8, 8\)\), whose weight is not standardized"):
        model(image(8), image(8))


def test_the_error_names_the_norm_and_both_layers():
    block, _ = WRONG["shortcut"](pgn(8))
    model = nn.ModuleDict({"neck": nn.Sequential(block)})
    expected = r"neck\.0\.norm: .*Conv2d\(8, 8\).*neck\.0\.conv \(Conv2d\(64, 8\)\), .*num_groups=8, not 1"
    with pytest.raises(InputError, match=expected):
        model["neck"][0](image(64), image(8))
    with pytest.raises(InputError, match=r"^norm: .*, but its input is made by Relu, which has no weight"):
        WRONG["layer before the previous activation"](pgn(8))[0](image(64))


def test_a_convolution_with_one_number_in_each_filter_is_used_as_it_is():
    """Its weight is a plain parameter also where the norm has +WS, since a single number has no deviation."""
    model = nn.Sequential(conv(8, groups=8), standardized(8))
    assert model(image(8)).isfinite().all()


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("norm", [nn.GroupNorm, GroupNorm])
def test_fixed_groups_depend_on_no_layer(name, norm, caplog):
    model, inputs = WRONG[name](norm(4, 8))
    if name == "convs, then norms":
        model.bn2 = norm(4, 8)
    model(*inputs)
    assert not caplog.records


def test_given_in_channels_stand_with_a_warning(caplog):
    model = nn.Sequential(conv(64), pgn(8, 24))
    for _ in range(2):
        model(image(64))
    (message,) = caplog.messages
    assert re.match(r"1: this norm was given in_channels=24.*0 \(Conv2d\(64, 8\)\), has 64", message)
    assert model[1].num_groups == 4
    nn.Sequential(conv(24), pgn(8, 24))(image(24))
    nn.Sequential(conv(64), nn.ReLU(), pgn(8, 24))(image(64))
    assert len(caplog.records) == 1


RIGHT = {
    "grouped": (lambda: nn.Conv2d(24, 8, 3, groups=4), image(24)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), image(8)),
    "dilated": (lambda: nn.Conv2d(24, 8, 3, dilation=2), image(24)),
    "transposed": (lambda: nn.ConvTranspose2d(24, 8, 3), image(24)),
    "transposed and grouped": (lambda: nn.ConvTranspose2d(24, 8, 3, groups=4), image(24)),
    "1d": (lambda: nn.Conv1d(24, 8, 3), torch.randn(2, 24, 9)),
    "3d": (lambda: nn.Conv3d(24, 8, 2), torch.randn(2, 24, 3, 3, 3)),
    "reflecting": (lambda: nn.Conv2d(24, 8, 3, padding=1, padding_mode="reflect"), image(24)),
    "linear": (lambda: nn.Linear(24, 8), torch.randn(4, 24)),
    "linear without bias": (lambda: nn.Linear(24, 8, bias=False), torch.randn(4, 24)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(conv(24)), image(24)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(conv(24)), image(24)),
    "old weight norm": (lambda: nn.utils.weight_norm(conv(24)), image(24)),
    "channels last": (lambda: conv(24).to(memory_format=torch.channels_last), image(24)),
    "lazy": (lambda: nn.LazyConv2d(8, 1), image(24)),
    "frozen, input with gradients": (lambda: conv(24).requires_grad_(False), image(24).requires_grad_()),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("kind", ["registered", "found in training"])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_kind_of_layer_is_recognized(name, kind, autocast):
    make, x = RIGHT[name]
    model = nn.Sequential(make(), *([nn.Identity()] * (kind == "found in training")), pgn(8))
    with torch.autocast("cpu", enabled=autocast):
        made = made_by(model[0](x))
        assert (made.n_in, made.n_out) == ((8 if name == "depthwise" else 24), 8)
        assert model(x).isfinite().all()
        assert model(x).isfinite().all()
    assert model[-1].num_groups == (1 if name == "depthwise" else 4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_layers_of_sequences(bias, transposed):
    layer, x = nn.Linear(64, 8, bias=bias), torch.randn(2, 7, 64)
    if transposed:
        x = torch.randn(7, 2, 64).transpose(0, 1)
    for tensor in (layer(x), layer(x).transpose(1, 2), layer(x).flatten(0, 1), layer(x).permute(0, 2, 1).contiguous()):
        assert made_by(tensor)[1:3] == (64, 8)


@pytest.mark.parametrize(
    "between",
    [nn.Identity(), nn.Flatten(2), nn.Unflatten(1, (8,)), lambda h: h.double().float(), lambda h: h.clone().mT]
    + [lambda h: h.contiguous(memory_format=torch.channels_last), lambda h: h.squeeze(0), lambda h: h.view_as(h)],
)
def test_views_and_copies_are_seen_through(between):
    assert made_by(between(conv(64)(image(64))))[1:3] == (64, 8)


NO_LAYER = {
    "Relu": F.relu,
    "LeakyRelu": F.leaky_relu,
    "Hardtanh": F.relu6,
    "Silu": F.silu,
    "Gelu": F.gelu,
    "Sigmoid": F.sigmoid,
    "Hardswish": F.hardswish,
    "Mish": F.mish,
    "Elu": F.elu,
    "PreluKernel": nn.PReLU(),
    "MaxPool2DWithIndices": lambda h: F.max_pool2d(h, 2),
    "AvgPool2D": lambda h: F.avg_pool2d(h, 2),
    "Mean": lambda h: F.adaptive_avg_pool2d(h, 1),
    "UpsampleNearest2D": lambda h: F.interpolate(h, scale_factor=2),
    "UpsampleBilinear2D": lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"),
    "Cat": lambda h: torch.cat([h, h], 1),
    "Add": lambda h: h + conv(8)(h),
    "Mul": lambda h: conv(8)(h) * h,
    "PixelShuffle": lambda h: F.pixel_shuffle(h, 2),
    "Cumsum": lambda h: h.cumsum(2),
    "GridSampler2D": lambda h: F.grid_sample(h, torch.zeros(2, 5, 5, 2), align_corners=False),
    "NativeBatchNorm": nn.BatchNorm2d(8),
}


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("op", NO_LAYER)
def test_what_is_no_layer_is_an_error_for_an_unbound_norm(op):
    h = NO_LAYER[op](conv(64)(image(64)))
    assert made_by(h).op == op
    with pytest.raises(InputError, match=f"never met a weight layer.*its input is made by {op}, which has no weight"):
        pgn(h.shape[1])(h)
    assert pgn(h.shape[1], 64)(h.repeat(1, 1, 2, 2)).isfinite().all()


class Hidden(torch.autograd.Function):
    """A function of the user's own, which may hold a layer."""

    @staticmethod
    def forward(ctx, h):
        return h * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.usefixtures("no_search")
def test_what_cannot_be_seen_is_silent_until_the_looks_end(caplog):
    """For a norm that is bound; one that is not stays an error."""
    h = Hidden.apply(conv(64)(image(64)))
    assert made_by(h) is None
    model = Net(lambda self, x: self.norm(Hidden.apply(self.conv(x))), conv=conv(64), decoy=conv(24), norm=pgn(8))
    for _ in range(LOOKS - 1):
        model(image(64))
    assert not caplog.records
    model(image(64))
    assert "this PGN. It follows Conv2d(24, 8) only because of the order" in caplog.text
    with pytest.raises(InputError, match="never met a weight layer"):
        pgn(8)(h)
    bind_norms(model, image(64))
    assert model.norm.num_groups == 8 and not model.norm.follows_registration
    caplog.clear()
    for _ in range(LOOKS):
        model.train()(image(64))
    assert not caplog.records


def test_a_long_history_is_followed_in_part():
    h = conv(64)(image(64))
    for _ in range(100):
        identity = nn.Identity()
        identity.register_full_backward_hook(lambda *_: None)
        h = identity(h)
    assert made_by(h) is None


def test_frozen_layers_are_silent_and_looked_at_once_they_train():
    model = Net(norm_first, conv=conv(64), side=conv(8), norm=pgn(8)).requires_grad_(False)
    for _ in range(LOOKS + 1):
        model(image(64), image(8))
    model.requires_grad_()
    with pytest.raises(InputError, match="was bound to"):
        model(image(64), image(8))


def test_an_unbound_norm_takes_its_groups_in_the_first_training_step(caplog):
    model = nn.Sequential(conv(64), nn.Identity(), pgn(8))
    copied_before = copy.deepcopy(model)
    with torch.no_grad(), pytest.raises(InputError, match="never met a weight layer"):
        model(image(64))
    model(image(64))
    (message,) = caplog.messages
    assert re.search("Copies of the model that were made earlier .* are not bound.*bind_norms", message)
    assert model[2].num_groups == 8 and "from Convolution(64, 8)" in repr(model[2])
    assert gng_d2.unbound_norms(model) == [] and gng_d2.unbound_norms(copied_before) == ["2"]
    model(image(64))
    assert len(caplog.records) == 1
    with pytest.raises(InputError, match="there is no weight to standardize.*bind_norms"):
        nn.Sequential(conv(64), nn.Identity(), GroupNorm(2, 8, weight_standardization=True))(image(64))


@pytest.mark.slow
def test_looks_end_and_begin_again_when_the_model_is_edited_or_trained_again():
    model = nn.Sequential(conv(64), pgn(8))
    for _ in range(LOOKS):
        model(image(64))
    assert model[1]._looks == 0
    model[0].weight = nn.Parameter(model[0].weight[:, :16].detach())
    model(image(16))  # no more looks
    with pytest.raises(InputError, match="was bound to"):
        model.train()(image(16))
    moved = nn.Sequential(conv(16), model[1])
    with pytest.raises(InputError, match="was bound to"):
        moved(image(16))


def test_norms_pickled_before_there_were_looks_look_and_nothing_refers_to_the_layer():
    model = nn.Sequential(conv(64), pgn(8))
    model(image(64))
    norm = pickle.loads(pickle.dumps(model[1]))
    assert not [v for v in vars(norm).values() if isinstance(v, nn.Module)] and not norm._modules
    del norm._looks
    with pytest.raises(InputError, match="was bound to"):
        nn.Sequential(conv(16), nn.Identity(), norm)(image(16))


class Checkpointed(nn.Module):
    def __init__(self, part, reentrant):
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm", [pgn, standardized])
def test_activation_checkpoints(reentrant, norm):
    part = nn.Sequential(conv(64), norm(8), nn.ReLU(), conv(8, 4), norm(4))
    x = image(64).requires_grad_()
    part(x).square().sum().backward()
    expected, x.grad = x.grad, None
    Checkpointed(part.train(), reentrant)(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    wrong, _ = WRONG["dead layer"](norm(8))
    with pytest.raises(InputError, match="was bound to"):
        Checkpointed(wrong, reentrant)(x).sum().backward()


def test_saved_tensors_are_not_unpacked():
    def fail(_):
        raise AssertionError("unpacked")

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, fail):
        nn.Sequential(conv(64), standardized(8), nn.ReLU(), conv(8), nn.Identity(), pgn(8))(image(64))
        with pytest.raises(InputError, match="was bound to"):
            WRONG["dead layer"](standardized(8))[0](image(64))


def test_compiling_looks_at_nothing_and_does_not_compile_again():
    model = nn.Sequential(conv(64), pgn(8), nn.ReLU(), conv(8), standardized(8))
    x = image(64)
    expected = model(x)
    count = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)
        model(x)  # which looks
    assert count.frame_count == 1


@pytest.mark.slow
def test_compiled_unbound_norms_are_bound_by_a_step_that_is_not_compiled():
    model = nn.Sequential(conv(64), nn.Identity(), pgn(8))
    torch._dynamo.reset()
    with pytest.raises(InputError, match="never met a weight layer"), torch.no_grad():
        torch.compile(model, backend="eager")(image(64))
    model(image(64))
    assert torch.compile(model, backend="eager")(image(64)).shape == (2, 8, 5, 5)


def test_vmap_and_functional_gradients_are_left_alone():
    model = nn.Sequential(conv(64), pgn(8))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, image(64))
    assert gradients["0.weight"].shape == (2, 8, 64, 1, 1)


class Tree(nn.Module):
    """Random layers and norms, at random depth, adjacent or registered in an order that is not the one they run in."""

    def __init__(self, draw, depth, scrambled):
        super().__init__()
        self.steps, self.between, children = [], [], {}
        for index in range(draw.randint(1, 3)):
            width = draw.choice([8, 16])
            parts = [(f"conv{index}", self.layer(draw, width))]
            if draw.random() < 0.8:
                parts.append((f"norm{index}", nn.GroupNorm(4, width) if draw.random() < 0.5 else pgn(width)))
            if depth and draw.random() < 0.4:
                parts.append((f"tree{index}", Tree(draw, depth - 1, scrambled)))
            children.update(parts)
            self.steps += [name for name, _ in parts]
        order = list(children)
        if scrambled:
            draw.shuffle(order)
        for name in order:
            setattr(self, name, children[name])

    @staticmethod
    def layer(draw, width):
        return draw.choice(
            [nn.LazyConv2d(width, 1), nn.LazyConvTranspose2d(width, 1), nn.LazyConv2d(width, 3, padding=1)]
        )

    def forward(self, x):
        for name in self.steps:
            step = getattr(self, name)
            x = step(x)
            x = x if "norm" in name or (f"norm{name[-1]}" in self.steps and "conv" in name) else F.relu(x)
        return F.relu(x)


def fixed(tree):
    """A copy of ``tree`` whose layers know their sizes when norms are registered, as most models do."""
    layers = {}
    for name, module in tree.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            layers[name] = type(module)(module.in_channels, module.out_channels, module.kernel_size, 1, module.padding)
    copied = copy.deepcopy(tree)
    for parent in copied.modules():
        if isinstance(parent, Tree):
            for name, child in list(parent.named_children()):
                path = next(path for path, m in copied.named_modules() if m is child)
                delattr(parent, name)
                new = layers.get(path) or (pgn(child.num_channels) if isinstance(child, pgn) else child)
                setattr(parent, name, new)
    return copied


def makers(model, x):
    """For each PGN the input channels of the layer whose output it took, by hooks on both."""
    made, found = {}, {}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda layer, args, out: made.__setitem__(out, args[0].shape[1]))
        elif isinstance(module, pgn):
            module.register_forward_pre_hook(lambda norm, args: found.update({norm: made.get(args[0])}))
    with torch.no_grad():
        model(x)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Lazy:UserWarning")
def test_no_difference_is_silent_in_random_trees(no_search):
    draw, x = random.Random(0), torch.randn(1, 3, 4, 4)
    counts = {"right": 0, "refused": 0, "bound in the step": 0}
    for index in range(300):
        scrambled = index % 2 == 1
        lazy = Tree(draw, 2, scrambled)
        norms = [m for m in lazy.modules() if isinstance(m, pgn)]
        for norm in norms:
            norm.num_groups = 1
        lazy(x)  # now the layers have sizes
        for norm in norms:
            norm.num_groups = None
        model = fixed(lazy)
        truth_model = copy.deepcopy(model)
        for norm in truth_model.modules():
            if isinstance(norm, pgn):
                norm.num_groups = 1
        truth = makers(truth_model, x)
        twins = dict(zip(truth_model.modules(), model.modules()))
        unbound = gng_d2.unbound_norms(model)
        try:
            model(x)
        except InputError:
            assert scrambled, "what is adjacent is bound rightly"
            counts["refused"] += 1
            bind_norms(model, x)
            model.train()(x)
        for norm, n_in in truth.items():
            assert twins[norm].num_groups == practical_num_groups(n_in, norm.num_channels)
            counts["right"] += 1
        counts["bound in the step"] += len(unbound)
    assert counts["right"] > 300 and counts["refused"] > 5 and counts["bound in the step"] > 100, counts
