"""bind_norms finds each norm's layer by running the model, and leaves the model as it was."""

import copy
import logging
import random

import numpy as np
import pytest
import torch
from needs import COMPILE, PARAMETRIZED_WEIGHT_NORM
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gng_d2 import (
    GroupNorm,
    PracticalGroupNorm,
    WSConv2d,
    bind_norms,
    convert_norms,
    norm_table,
    practical_num_groups,
    unbound_norms,
)
from gng_d2.errors import InputError
from gng_d2.layers.kinds import NO_LAYER

pgn = PracticalGroupNorm


def conv(n_in, n_out=8, **options):
    return nn.Conv2d(n_in, n_out, 1, **options)


def image(channels, device="cpu"):
    return torch.randn(2, channels, 5, 5, device=device)


class Then(nn.Module):
    """A layer, a function of its output, and a norm."""

    def __init__(self, layer, function, norm):
        super().__init__()
        self.norm = norm  # before the layer, so that registration does not bind it
        self.layer = layer
        self.function = function

    def forward(self, x):
        return self.norm(self.function(self.layer(x)))


THROUGH = {
    "nothing": lambda h: h,
    "dropout": nn.Dropout2d(),
    "identity": nn.Identity(),
    "reshapes": lambda h: h.flatten(1).unflatten(1, (8, 5, 5)).transpose(2, 3).permute(0, 1, 3, 2),
    "squeezes": lambda h: h.unsqueeze(0).squeeze(0),
    "copies": lambda h: h.double().clone().contiguous(memory_format=torch.channels_last).to(torch.float32),
    "copied by a reshape": lambda h: h.transpose(2, 3).reshape(2, 8, 25),
    "sum with its mean": lambda h: h + h.mean(),
    "sum in place": lambda h: h.add_(h.mean()),
    "product with itself": lambda h: h * h.sigmoid(),
    "whole slice": lambda h: h[:, :],
    "detach": lambda h: h.detach(),
    "causal crop": lambda h: h[:, :, :-2],
    "padding": lambda h: F.pad(h, (1, 2)),
    "scaling": lambda h: torch.div(input=2.0 * h * 0.5, other=torch.tensor(3.0)),
    "scaling in place": lambda h: h.mul_(2),
    "mask": lambda h: h.masked_fill(torch.zeros(5, dtype=torch.bool, device=h.device), 0.0),
    "reshape by name": lambda h: torch.reshape(input=h, shape=(2, 8, 25)),
    "checkpoint": lambda h: checkpoint(nn.Identity(), h, use_reentrant=True, preserve_rng_state=False),
}
NO_SINGLE_LAYER = {
    "relu": F.relu,
    "relu in place": lambda h: F.relu(h, inplace=True),
    "relu_": torch.relu_,
    "cat": lambda h: torch.cat([h[:, :4], h[:, 4:]], 1),
    "pooling": lambda h: F.max_pool2d(h, 2),
    "upsampling": lambda h: F.interpolate(h, scale_factor=2),
    "batch norm": nn.BatchNorm2d(8),
    "reciprocal": lambda h: torch.div(torch.tensor(1.0), h),
    "padding of channels": lambda h: F.pad(h, (0, 0, 0, 0, 4, 4))[:, 2:10],
    "some of its channels": lambda h: torch.cat([h[:, :4], h[:, :4]], 1),
    "half of its channels": lambda h: h.repeat(1, 2, 1, 1).chunk(2, 1)[1],
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [*THROUGH, *NO_SINGLE_LAYER])
def test_what_stands_between(name, device):
    between = copy.deepcopy({**THROUGH, **NO_SINGLE_LAYER}[name])  # the other device is not its
    model = Then(conv(24), between, pgn(8)).to(device)
    assert bind_norms(model, image(24)) is model  # moved to its device
    if name in THROUGH:
        assert model.norm.num_groups == 4 and "from Conv2d(24, 8)" in repr(model.norm)
    else:
        assert model.norm.num_groups == 1 and model.norm.weight_layer == NO_LAYER and NO_LAYER in repr(model.norm)
    (row,) = [row for row in norm_table(model) if row.norm == "PGN"]
    assert (row.n_in, row.n_out, row.num_groups) == ((24, 8, 4) if name in THROUGH else (8, 8, 1))
    assert row.layer == ("Conv2d(24, 8)" if name in THROUGH else NO_LAYER)


LAYERS = {
    "grouped": (lambda: nn.Conv2d(24, 8, 3, groups=4), (2, 24, 5, 5)),
    "unbatched": (lambda: nn.Conv2d(24, 8, 3), (24, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(24, 8, 3, groups=2), (2, 24, 5, 5)),
    "1d": (lambda: nn.Conv1d(24, 8, 3), (2, 24, 5)),
    "3d": (lambda: nn.Conv3d(24, 8, 1), (2, 24, 2, 2, 2)),
    "linear": (lambda: nn.Linear(24, 8), (5, 24)),
    "lazy": (lambda: nn.LazyConv2d(8, 3), (2, 24, 5, 5)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(24, 8, 1)), (2, 24, 5, 5)),
    "standardized": (lambda: WSConv2d(24, 8, 1), (2, 24, 5, 5)),
    "a product with a parameter": (lambda: Product(), (5, 24)),
    "a product with a bias": (lambda: Product(lambda x, w, b: torch.addmm(b, x, w)), (5, 24)),
    "arguments by name": (lambda: Product(lambda x, w, b: F.linear(input=x, weight=w.T, bias=b)), (5, 24)),
    "a convolution by name": (lambda: Product(lambda x, w, b: F.conv1d(x, weight=w.T[:, :, None], bias=b)), (2, 24, 5)),
    "a sum by name": (lambda: Product(lambda x, w, b: torch.add(input=torch.mm(x, mat2=w), other=b)), (5, 24)),
    "a weight on the left": (lambda: Product(lambda x, w, b: w.T @ x), (2, 24, 5)),
    "PyTorch's own convolution": (
        lambda: Product(lambda x, w, b: torch.convolution(x, w.T[:, :, None], b, [1], [0], [1], False, [0], 1)),
        (2, 24, 5),
    ),
}


class Product(nn.Module):
    def __init__(self, op=lambda x, w, b: x @ w + b):
        super().__init__()
        self.weight, self.shift, self.op = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.zeros(8)), op

    def forward(self, x):
        return self.op(x, self.weight, self.shift)


@pytest.mark.filterwarnings("ignore:Lazy")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=PARAMETRIZED_WEIGHT_NORM if name == "weight norm" else ()) for name in LAYERS]
)
def test_every_kind_of_layer(name):
    make, shape = LAYERS[name]
    expands = (lambda h: h[None]) if name == "unbatched" else (lambda h: h)
    model = bind_norms(Then(make(), expands, pgn(8)), torch.randn(shape))
    assert model.norm.num_groups == 4
    model(torch.randn(shape))  # autograd agrees


@pytest.mark.parametrize(
    "inputs", [image(24), (image(24),), {"x": image(24)}, [image(24)]], ids=["tensor", "tuple", "dict", "list"]
)
def test_example_inputs(inputs):
    model = Then(conv(24), lambda h: h, pgn(8))
    if isinstance(inputs, list):
        model.layer = nn.Sequential(Head(), conv(24))
    bind_norms(model, inputs)
    assert model.norm.num_groups == 4


class Head(nn.Module):
    def forward(self, images):
        return torch.stack([x[0] for x in images])


def test_wrong_bindings_are_mended_and_given_in_channels_stand():
    class Block(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.skip, self.norm, self.given = conv(64), conv(8), norm, pgn(8, 24)

        def forward(self, x, y):
            return self.given(self.norm(self.conv(x)) + self.skip(y))

    block = Block(pgn(8))
    assert block.norm.num_groups == 1
    bind_norms(block, (image(64), image(8)))
    assert block.norm.num_groups == 8 and block.given.num_groups == 4
    block(image(64), image(8))

    block = Block(pgn(8, weight_standardization=True))
    raw = block.skip.weight
    assert type(block.skip) is WSConv2d
    bind_norms(block, (image(64), image(8)))
    assert type(block.skip) is nn.Conv2d and block.skip.weight is raw and type(block.conv) is WSConv2d
    assert norm_table(block)[0].weight_standardized
    block(image(64), image(8))


def test_standardization_where_there_is_no_convolution():
    model = bind_norms(Then(conv(24), F.relu, pgn(8, weight_standardization=True)), image(24))
    assert model.norm.num_groups == 1 and not norm_table(model)[0].weight_standardized
    assert type(model.layer) is nn.Conv2d
    with pytest.raises(
        InputError, match=r"PGN\+WS cannot follow a torch\.nn\.modules\.linear\.Linear: only the Conv2d"
    ):
        bind_norms(Then(nn.Linear(24, 8), lambda h: h, pgn(8, weight_standardization=True)), torch.randn(2, 24))
    model = bind_norms(Then(conv(24), lambda h: h, GroupNorm(2, 8, weight_standardization=True)), image(24))
    assert type(model.layer) is WSConv2d
    model(image(24)).sum().backward()


def test_no_norm_is_bound_where_one_cannot_be():
    layers = conv(24), nn.Dropout(), pgn(8, weight_standardization=True)
    model = nn.Sequential(*layers, nn.ConvTranspose2d(8, 8, 1), nn.Dropout(), pgn(8, weight_standardization=True))
    with pytest.raises(InputError, match="only the Conv2d"):
        bind_norms(model, image(24))
    assert unbound_norms(model) == ["2", "5"] and type(model[0]) is nn.Conv2d


def test_a_norm_in_two_places_with_layers_of_other_sizes_is_an_error():
    norm = pgn(8)
    model = nn.Sequential(conv(24), nn.Identity(), norm, conv(8), nn.Identity(), norm)
    with pytest.raises(InputError, match=r"^2: .* several places.*Conv2d\(24, 8\), Conv2d\(8, 8\)"):
        bind_norms(model, image(24))
    assert unbound_norms(model) == ["2"]
    norm = pgn(8)
    model = nn.Sequential(conv(8), nn.Identity(), norm, conv(8), nn.Identity(), norm)
    assert bind_norms(model, image(8))[2].num_groups == 1


class ThroughNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.numpy() * 2)


def test_what_does_not_run_or_cannot_be_seen_stays_unbound(caplog):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.first, self.hidden, self.seen = pgn(8), pgn(8), pgn(8), pgn(8)
            self.conv = conv(24)

        def forward(self, x):
            self.hidden(ThroughNumpy.apply(self.conv(x)))
            return self.seen(self.conv(x))

    model = Model()
    with caplog.at_level(logging.INFO):
        bind_norms(model, image(24))
    assert unbound_norms(model) == ["unused", "first", "hidden"]
    assert "1 norms are bound" in caplog.text and "3 stay unbound (unused, first, hidden)" in caplog.text


class BehindNumpy(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.decoy, self.norm = conv(64), conv(24), norm

    def forward(self, x):
        return self.norm(ThroughNumpy.apply(self.conv(x)))


def test_what_rests_on_registration_and_cannot_be_seen_is_unbound_and_listed(caplog):
    model = bind_norms(BehindNumpy(pgn(8)), image(64))
    assert unbound_norms(model) == ["norm"] and model.norm.in_channels is None
    assert "changed the number of groups of 1 norms: norm: 4 -> none, because its layer cannot be found" in caplog.text
    model = bind_norms(BehindNumpy(pgn(8, weight_standardization=True)), image(64))
    assert unbound_norms(model) == ["norm"] and type(model.decoy) is nn.Conv2d
    model = convert_norms(BehindNumpy(nn.BatchNorm2d(8)), "PGN", image(64))
    assert unbound_norms(model) == ["norm"]
    assert "1 have no groups until bind_norms, or a training step that shows their layer (norm)" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, image(64)), pytest.param("compile", marks=COMPILE)]
)
def test_parts_that_are_scripted_traced_or_compiled_are_seen(make):
    part = nn.Sequential(conv(64), nn.Identity())
    part = torch.compile(part, backend="eager") if make == "compile" else make(part)
    model = nn.Sequential(part, conv(8, 24), conv(24), pgn(8))
    model.forward = lambda x: model[3](model[0](x))
    assert bind_norms(model, image(64))[3].num_groups == 8
    model.forward = lambda x: model[3](torch.jit.script(nn.ReLU())(model[0](x)))
    assert bind_norms(model, image(64))[3].weight_layer == NO_LAYER


def test_inference_mode_inside_the_model():
    class Model(Then):
        def forward(self, x):
            with torch.inference_mode():
                return super().forward(x)

    for layer, shape in ((conv(64), (2, 64, 5, 5)), (nn.Linear(64, 8), (2, 64))):
        assert bind_norms(Model(layer, lambda h: h * 2, pgn(8)), torch.randn(shape)).norm.num_groups == 8


def test_a_norm_in_two_places_where_its_groups_are_the_same():
    norm = pgn(8)
    model = nn.Sequential(conv(8), nn.Identity(), norm, nn.ReLU(), norm, conv(8, 4), conv(4), nn.Identity(), norm)
    assert bind_norms(model, image(8))[2].num_groups == 1


def test_a_norm_on_the_input_of_the_model_follows_no_layer():
    model = bind_norms(nn.Sequential(pgn(24), conv(24)), image(24))
    assert (model[0].num_groups, model[0].weight_layer) == (1, NO_LAYER)


def test_the_model_and_the_generators_are_as_before():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", None)

        def forward(self, x):
            self.calls += 1
            random.random(), np.random.rand(), torch.rand(1)
            return x

    model = nn.Sequential(conv(24), nn.BatchNorm2d(8), Counts(), conv(8, 16), nn.Dropout(), pgn(16), nn.BatchNorm2d(16))
    model[1].eval()
    before = copy.deepcopy(model)
    x = image(24)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    bind_norms(model, x)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, value), other in zip(model.state_dict().items(), before.state_dict().values()):
        assert torch.equal(value, other), name
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_buffers_that_cannot_be_compared_or_written():
    model = nn.Sequential(conv(24), nn.Dropout(), pgn(8))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("csr", torch.eye(3).to_sparse_csr())
    model.register_buffer("expanded", torch.tensor(float("nan")).expand(4))
    bind_norms(model, image(24))
    assert model[2].num_groups == practical_num_groups(24, 8)


def test_spectral_norm_takes_no_step_and_is_no_norm(caplog):
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(conv(24)), nn.BatchNorm2d(8)).train()
    before = copy.deepcopy(model.state_dict())
    convert_norms(model, "PGN", image(24))
    norm_table(model)
    assert model[1].num_groups == practical_num_groups(24, 8) and "SpectralNorm" not in caplog.text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if key.startswith("0"))


def test_a_model_that_cannot_run_is_an_error_and_as_before():
    model = nn.Sequential(conv(24), nn.Dropout(), pgn(8), nn.Flatten(), nn.Linear(7, 3)).train()
    with pytest.raises(InputError, match=r"example_inputs: Sequential cannot be run with them.*RuntimeError: "):
        bind_norms(model, image(24))
    assert unbound_norms(model) == ["2"] and model.training and model[2].num_groups is None


@COMPILE
def test_works_within_inference_mode_and_under_torch_compile():
    model = nn.Sequential(conv(24), nn.Dropout(), pgn(8))
    with torch.inference_mode():
        bind_norms(model, image(24))
    assert model[2].num_groups == 4
    model = torch.compile(nn.Sequential(conv(24), nn.Dropout(), pgn(8)), backend="eager")
    assert bind_norms(model, image(24)) is model and model._orig_mod[2].num_groups == 4


def test_copies_made_afterwards_are_bound():
    model = bind_norms(nn.Sequential(conv(24), nn.Dropout(), pgn(8)), image(24))
    ema = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        assert torch.equal(ema(image(24)[:1]).isfinite().all(), torch.tensor(True))


class ByIdentity(TorchFunctionMode):
    """The input channels of each tensor that a convolution made, by the tensor itself."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            self.made[id(out)] = (args[0].shape[1], out)
        return out


@pytest.mark.parametrize("name, without", [("res2net50_26w_4s", 0), ("resnest14d", 0), ("convnext_atto", 4)])
def test_timms_models(name, without):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, norm_layer=pgn)
    assert unbound_norms(model)
    bind_norms(model, torch.zeros(1, 3, 64, 64))
    norms = [m for m in model.modules() if isinstance(m, pgn)]
    assert not unbound_norms(model) and sum(norm.weight_layer == NO_LAYER for norm in norms) == without
    with ByIdentity() as identity, torch.no_grad():
        for norm in norms:
            norm.register_forward_pre_hook(lambda norm, args: check(norm, identity.made.get(id(args[0]))))
        model.eval()(torch.zeros(1, 3, 64, 64, device="meta"))


def check(norm, made):
    assert norm.num_groups == (practical_num_groups(made[0], norm.num_channels) if made else 1)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_detectron2s_models_with_their_list_of_dicts(device):
    from detectron2.modeling import build_model

    from gng_d2.job.config import load_config

    cfg = load_config("configs/quick/pfpn_pgn.yaml", ["MODEL.DEVICE", device, "MODEL.FPN.NORM", "PGN"])
    if device == "meta":  # where no proposals can be chosen
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    model = build_model(cfg)
    groups = {name: m.num_groups for name, m in model.named_modules() if isinstance(m, pgn)}
    images = [{"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "height": 64, "width": 64}]
    bind_norms(model, images)
    assert groups and groups == {name: m.num_groups for name, m in model.named_modules() if isinstance(m, pgn)}
    assert all(row.layer + ".norm" == row.name for row in norm_table(model) if row.norm == "PGN")
