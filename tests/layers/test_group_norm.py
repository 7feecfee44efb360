import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.fx
from needs import COMPILE, HALF, LOOK, needs_torch
from torch import nn

from gng_d2 import GroupNorm, PracticalGroupNorm, WSConv2d
from gng_d2.errors import InputError
from gng_d2.layers.norm_names import norm_from_name

DTYPES = [torch.float64, torch.float32, HALF, torch.bfloat16]


def brute_force(x, num_groups, weight, bias, eps):
    """Equations 2 to 5 of the paper, one group of one image at a time, in float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    size = x.shape[1] // num_groups
    for image in range(x.shape[0]):
        for group in range(num_groups):
            part = x[image, group * size : (group + 1) * size].double()
            mean = part.mean()
            out[image, group * size : (group + 1) * size] = (part - mean) / ((part - mean).square().mean() + eps).sqrt()
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return out * weight.double().view(shape) + bias.double().view(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 24, 7, 5), (3, 24), (2, 24, 9), (1, 24, 3, 4, 2)])
def test_equals_the_equations(shape, dtype):
    torch.manual_seed(0)
    norm = PracticalGroupNorm(24, in_channels=60).to(dtype)  # G_ideal 9 -> 8
    assert norm.num_groups == 8
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=dtype)
    out = norm(x)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    expected = brute_force(x, 8, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_needs_no_binding_where_in_channels_are_given():
    assert PracticalGroupNorm(64, in_channels=256).num_groups == 64
    assert PracticalGroupNorm(64, 128).num_groups == 16
    assert PracticalGroupNorm(64, 128, gain_ratio=0.75).num_groups == 8
    norm = PracticalGroupNorm(64, 64, eps=1e-3, affine=False)
    assert norm.eps == 1e-3 and norm.weight is None


def test_bad_sizes_are_refused_where_they_are_given():
    with pytest.raises(ValueError, match="n_out"):
        PracticalGroupNorm(0)
    with pytest.raises(TypeError, match="n_in"):
        PracticalGroupNorm(64, in_channels=2.0)
    with pytest.raises(ValueError, match="gain_ratio"):
        PracticalGroupNorm(64, gain_ratio=-1)


def test_takes_what_group_norm_takes():
    for norm in (GroupNorm(2, 8, 1e-3, False, "meta", torch.float64), PracticalGroupNorm(8, 24, 1e-3, False, "meta")):
        assert norm.eps == 1e-3 and not norm.affine and norm.weight is None
    norm = PracticalGroupNorm(8, device="meta", dtype=torch.bfloat16)  # as timm passes them
    assert norm.weight.is_meta and norm.bias.dtype == torch.bfloat16
    for make, sizes in ((GroupNorm, (2, 8)), (PracticalGroupNorm, (8, 24))):
        skipped = nn.utils.skip_init(make, *sizes)
        assert skipped.weight.shape == (8,) and skipped.num_groups == make(*sizes).num_groups
    assert list(inspect.signature(GroupNorm).parameters)[:6] == list(inspect.signature(nn.GroupNorm).parameters)[:6]


@pytest.mark.parametrize("sizes", [(0, 8), (-2, 8), (3, 64), (8, 0), (16, 8), (2, -8)])
def test_sizes_that_make_no_groups_are_refused_at_once(sizes):
    with pytest.raises(InputError, match="num_groups|num_channels"):
        GroupNorm(*sizes)


@pytest.mark.parametrize("sizes", [(2.0, 8), ("2", 8), (True, 8), (None, 8), (2, 8.0), (2, None)])
def test_sizes_that_are_no_integers_are_refused_at_once(sizes):
    with pytest.raises(TypeError, match="num_groups|num_channels"):
        GroupNorm(*sizes)
    assert GroupNorm(np.int64(2), np.int64(8))(torch.randn(1, 8, 2, 2)).shape == (1, 8, 2, 2)


def test_in_channels_and_standardization_together_are_refused():
    with pytest.raises(InputError, match="in_channels=24, weight_standardization=True"):
        PracticalGroupNorm(8, in_channels=24, weight_standardization=True)


@pytest.mark.parametrize("training", [True, False])
def test_arguments_in_the_order_of_group_norm_are_named(training):
    norm = PracticalGroupNorm(32, 256)
    assert "num_channels=32, num_groups=32, in_channels=256" in repr(norm)
    with torch.set_grad_enabled(training):
        with pytest.raises(
            InputError, match=r"\(num_channels, in_channels\), not nn.GroupNorm's .*PracticalGroupNorm\(256"
        ):
            norm(torch.randn(1, 256, 4, 4))
        with pytest.raises(InputError, match=r"^1: it takes inputs \(N, 8, \*\), not \(1, 16, 4, 4\)"):
            nn.Sequential(nn.Identity(), GroupNorm(2, 8, affine=False))(torch.randn(1, 16, 4, 4))
        with pytest.raises(InputError, match=r"not \(8,\)"):
            GroupNorm(2, 8)(torch.randn(8))
        with pytest.raises(InputError, match="num_groups=48 does not divide num_channels=64"):
            norm_from_name("GN48")(64)(torch.randn(1, 64, 4, 4))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(24, 8, 1), PracticalGroupNorm(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), PracticalGroupNorm(8, weight_standardization=True))
        self.own = WSConv2d(8, 16, 1, norm=GroupNorm(4, 16), activation=nn.ReLU())

    def forward(self, x):
        return self.own(self.body(self.stem(x)))


def test_fx_keeps_norms_and_standardized_convolutions_whole():
    model, x = Named(), torch.randn(2, 24, 6, 6)
    traced = torch.fx.symbolic_trace(model)
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["stem.0", "stem.1", "stem.2", "body.0", "body.1", "own"]
    assert torch.equal(traced(x), model(x)) and traced.state_dict().keys() == model.state_dict().keys()
    assert type(traced.body.get_submodule("0")) is WSConv2d
    traced(x).sum().backward()


@LOOK
def test_a_traced_norm_takes_its_groups_in_training():
    unbound = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(24, 8, 1), nn.Identity(), PracticalGroupNorm(8)))
    assert unbound(torch.randn(2, 24, 6, 6)).shape == (2, 8, 6, 6)
    assert unbound.get_submodule("2").num_groups == 4


def test_feature_extraction_of_torchvision():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model, x = Named(), torch.randn(2, 24, 6, 6)
    assert get_graph_node_names(model)[0] == ["x", "stem.0", "stem.1", "stem.2", "body.0", "body.1", "own"]
    features = create_feature_extractor(model, {"stem.1": "normalized", "own": "out"})(x)
    assert torch.equal(features["normalized"], model.stem[:2](x)) and torch.equal(features["out"], model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization_by_fx():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    model, x = Named().eval(), torch.randn(2, 24, 6, 6)
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (x,))
    torch.testing.assert_close(prepared(x), model(x))


def test_repr_shows_groups_and_source():
    conv = nn.Sequential(nn.Conv2d(256, 128, 3), PracticalGroupNorm(128))
    assert "num_groups=32" in repr(conv[1]) and "from Conv2d(256, 128)" in repr(conv[1])
    assert "in_channels=256" in repr(PracticalGroupNorm(128, 256))
    assert "num_groups=None" in repr(PracticalGroupNorm(128))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(48, 16, 3), PracticalGroupNorm(16), nn.ReLU())


def test_copies_and_pickles(block):
    x = torch.randn(2, 48, 6, 6)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin[1].num_groups == 8
        assert torch.equal(twin(x), block(x))
    unbound = copy.deepcopy(PracticalGroupNorm(16))
    assert nn.Sequential(nn.Linear(48, 16), unbound)[1].num_groups == 8


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of PyTorch's own F.group_norm
@pytest.mark.parametrize("compiler", ["trace", "script"])
def test_trace_and_script(block, compiler):
    x = torch.randn(2, 48, 6, 6)
    compiled = torch.jit.trace(block, x) if compiler == "trace" else torch.jit.script(block)
    other = torch.randn(3, 48, 9, 5)
    torch.testing.assert_close(compiled(other), block(other))


def test_group_norm_checkpoint_loads(block):
    plain = nn.Sequential(nn.Conv2d(48, 16, 3), nn.GroupNorm(8, 16), nn.ReLU())
    nn.init.normal_(plain[1].weight)
    assert block.state_dict().keys() == plain.state_dict().keys()
    block.load_state_dict(plain.state_dict())
    x = torch.randn(2, 48, 6, 6)
    torch.testing.assert_close(block(x), plain(x))


def test_is_a_group_norm_to_detectron2s_optimizer(block):
    from detectron2.solver.build import get_default_optimizer_params

    groups = get_default_optimizer_params(block, weight_decay=0.5, weight_decay_norm=0.25)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay[id(block[1].weight)] == 0.25 and decay[id(block[0].weight)] == 0.5


class Unbound(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.ModuleDict({"head": nn.ModuleList([nn.ReLU(), PracticalGroupNorm(8)])})

    def forward(self, x):
        return self.tower["head"][1](x)


def test_never_bound_is_an_error_that_names_the_module():
    model = nn.ModuleDict({"backbone": nn.Identity(), "neck": Unbound()})
    with pytest.raises(InputError, match=r"^neck\.tower\.head\.1: .*never met a weight layer"):
        model["neck"](torch.randn(2, 8, 4, 4))


SINGLE = {
    "linear": (nn.Sequential(nn.Linear(50, 10), PracticalGroupNorm(10)), (4, 50)),
    "1x1 map": (nn.Sequential(nn.Conv2d(50, 10, 1), PracticalGroupNorm(10)), (4, 50, 1, 1)),
    "fixed": (nn.Sequential(nn.Conv2d(6, 10, 1), GroupNorm(10, 10)), (4, 6, 1, 1)),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("training", [True, False])
def test_group_of_a_single_number_is_an_error(name, training):
    model, shape = SINGLE[name]
    with pytest.raises(InputError, match=r"^1: each of the 10 groups .* single number"):
        model.train(training)(torch.randn(shape))


def test_instance_norm_on_a_map_is_allowed():
    model = SINGLE["1x1 map"][0]
    out = model(torch.randn(1, 50, 3, 3))
    torch.testing.assert_close(out.mean((2, 3)), torch.zeros(1, 10), atol=1e-6, rtol=0)
    assert model(torch.randn(0, 50, 3, 3)).shape == (0, 10, 3, 3)


def test_groups_that_do_not_divide_are_refused_at_binding():
    norm = norm_from_name("GN48")(64)  # as RetinaNet probes it, no error yet
    with pytest.raises(InputError, match=r"GN48 cannot follow Conv2d\(3, 64\)"):
        nn.Sequential(nn.Conv2d(3, 64, 3), norm)


@needs_torch(2, 4, "torch.export with sizes that vary")
def test_exports_with_any_size():
    block = nn.Sequential(nn.Conv2d(256, 8, 1), PracticalGroupNorm(8))  # 8 groups of 8: the check for single numbers
    size = torch.export.Dim("size", min=2, max=64)
    program = torch.export.export(block, (torch.randn(1, 256, 6, 6),), dynamic_shapes=({2: size},))
    x = torch.randn(1, 256, 9, 6)
    torch.testing.assert_close(program.module()(x), block(x))


@COMPILE
def test_compiles_without_a_graph_break(block):
    x = torch.randn(2, 48, 6, 6)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))


def test_moves_between_types_and_devices(block):
    half = block.to(torch.bfloat16)
    assert half[1].weight.dtype == torch.bfloat16 and half[1].num_groups == 8
    assert block.to("meta")(torch.empty(1, 48, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (1, 16, 3, 3)
