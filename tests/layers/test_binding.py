import pytest
import torch
import torchvision
from detectron2.layers import Conv2d, get_norm
from needs import PARAMETRIZED_WEIGHT_NORM
from torch import nn
from torch.nn.utils import prune

from gng_d2 import GroupNorm, PracticalGroupNorm, WSConv2d, convert_norms, unbound_norms
from gng_d2.errors import InputError
from gng_d2.layers.binding import build_naming_norms, named_norms


def pgn(channels=8):
    return PracticalGroupNorm(channels)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(24, 8, 3),
        nn.Conv2d(24, 8, 3),
        nn.Conv3d(24, 8, 3),
        nn.ConvTranspose2d(24, 8, 3),
        nn.Linear(24, 8),
        nn.Conv2d(24, 8, 3, groups=4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_sibling(layer):
    assert nn.Sequential(layer, pgn(), nn.ReLU())[1].num_groups == 4


def test_owner():
    assert Conv2d(24, 8, 3, norm=pgn()).norm.num_groups == 4


def test_takes_the_layer_right_before_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(16, 8, 1)
            self.a_bn = pgn()
            self.relu = nn.ReLU()
            self.b = nn.Conv2d(40, 8, 1)
            self.b_bn = pgn()

    block = Block()
    assert (block.a_bn.num_groups, block.b_bn.num_groups) == (2, 8)
    # replaced by name: what stands before that name counts, not what was registered last
    block.a_bn = pgn()
    assert block.a_bn.num_groups == 2


@pytest.mark.parametrize(
    "children",
    [
        lambda norm: [nn.Conv2d(24, 8, 1), nn.ReLU(), norm],  # not right before
        lambda norm: [nn.Conv2d(24, 16, 1), norm],  # other width
        lambda norm: [nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8), norm],
        lambda norm: [Conv2d(24, 8, 1, norm=nn.BatchNorm2d(8)), norm],  # claimed by its own norm
        lambda norm: [nn.Conv2d(24, 8, 1), pgn(), norm],  # claimed by the norm between
        lambda norm: [norm, nn.Conv2d(24, 8, 1)],
        lambda norm: [nn.Embedding(24, 8), norm],
    ],
)
def test_no_guess(children):
    norm = pgn()
    nn.Sequential(*children(norm))
    assert norm.num_groups is None


def test_given_in_channels_win():
    norm = PracticalGroupNorm(8, in_channels=16)
    assert Conv2d(24, 8, 3, norm=norm).norm.num_groups == 2


def test_a_new_owner_rebinds_and_a_new_neighbour_does_not():
    norm = Conv2d(24, 8, 3, norm=pgn()).norm
    nn.Sequential(nn.Conv2d(40, 8, 1), norm)
    assert norm.num_groups == 4
    assert Conv2d(40, 8, 3, norm=norm).norm.num_groups == 8


def test_a_layer_that_takes_anothers_place_rebinds_the_norm_after_it():
    block = nn.Sequential(nn.Conv2d(24, 8, 1), pgn(), nn.Conv2d(8, 8, 1), PracticalGroupNorm(8, in_channels=24))
    block[0] = nn.Conv2d(40, 8, 1)
    block[2] = nn.Conv2d(40, 8, 1)
    assert block[1].num_groups == 8
    assert block[3].num_groups == 4  # its in_channels were given


class OutOfOrder(nn.Module):
    """Its second convolution stands between the first one and the first one's norm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 16, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))


def replace_the_layer_between(model):
    model.conv2 = nn.Conv2d(16, 16, 1)


def register_all_again(model):
    for name, child in model.named_children():
        setattr(model, name, child)


@pytest.mark.parametrize(
    "change", [nn.SyncBatchNorm.convert_sync_batchnorm, replace_the_layer_between, register_all_again]
)
@pytest.mark.parametrize("norm", ["PGN", "PGN+WS", "GN4+WS"])
def test_what_a_run_found_outlasts_what_is_registered_later(change, norm):
    model = convert_norms(OutOfOrder(), norm, torch.ones(1, 64, 4, 4))
    before = [(module.num_groups, module.weight_layer) for module in (model.bn1, model.bn2)]
    change(model)
    assert before == [(module.num_groups, module.weight_layer) for module in (model.bn1, model.bn2)]
    assert isinstance(model.conv1, WSConv2d) == norm.endswith("+WS")
    assert isinstance(model.conv2, WSConv2d) == (norm.endswith("+WS") and change is not replace_the_layer_between)


def test_a_layer_of_the_same_sizes_in_its_place_is_standardized_as_it_was():
    model = nn.Sequential(nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16))
    convert_norms(model, "PGN+WS", torch.ones(1, 64, 4, 4))
    model[0] = nn.Conv2d(64, 16, 3)
    assert isinstance(model[0], WSConv2d)


def test_a_neighbour_that_is_not_standardized_is_not_the_layer_of_a_norm_with_ws():
    """Both have the same sizes, so that only the standardized weight tells them apart."""

    class Neighbours(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out, self.norm = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x):
            return self.out(self.norm(self.conv(x)))

    x = torch.ones(1, 16, 4, 4)
    model = convert_norms(Neighbours(), "GN4+WS", x)
    assert [row[2] for row in named_norms(model)] == [None]
    model.out = nn.Conv2d(16, 16, 1)
    assert not isinstance(model.out, WSConv2d) and isinstance(model.conv, WSConv2d)
    with pytest.raises(InputError, match="Which convolution has to lose it is seen only when the model runs"):
        convert_norms(model, "GN4")
    convert_norms(model, "GN4", x)
    assert not any(isinstance(module, WSConv2d) for module in model.modules())


def test_a_block_that_looks_like_a_layer_is_none():
    class ExpandProject(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_channels, self.out_channels, self.kernel_size = 16, 8, 3
            self.expand = nn.Conv2d(16, 64, 1)
            self.project = nn.Conv2d(64, 8, 1)
            self.norm = pgn()

    assert ExpandProject().norm.num_groups == 8


def test_a_module_used_twice_still_stands_between():
    relu = nn.ReLU()
    assert nn.Sequential(relu, nn.Conv2d(24, 8, 1), relu, pgn())[3].num_groups is None


def test_none_and_other_modules_pass_through():
    block = nn.Module()
    block.register_module("norm", None)
    block.add_module("conv", nn.Conv2d(3, 4, 1))
    assert block.norm is None


def test_named_norms_finds_every_kind():
    model = nn.Sequential(
        Conv2d(3, 32, 1, norm=nn.GroupNorm(32, 32)),
        nn.Sequential(nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)),
        nn.Sequential(nn.ReLU(), nn.GroupNorm(4, 16)),
        Conv2d(16, 8, 1, norm=GroupNorm(1, 8)),
    )
    found = [(name, layer_name) for name, _, layer_name, _ in named_norms(model)]
    assert found == [("0.norm", "0"), ("1.1", "1.0"), ("2.1", None), ("3.norm", "3")]


def test_norms_of_other_packages_are_no_trouble():
    class LayerNorm(nn.Module):
        pass

    model = nn.Sequential(nn.Conv2d(3, 8, 1), torchvision.ops.FrozenBatchNorm2d(8), LayerNorm())
    assert [(name, layer_name) for name, _, layer_name, _ in named_norms(model)] == [("1", "0")]


def test_shared_norm_is_listed_where_it_stands():
    norm = pgn()
    model = nn.Sequential(nn.Conv2d(24, 8, 1), norm, nn.Conv2d(8, 8, 1), norm)
    assert norm.num_groups == 4
    assert [row[2] for row in named_norms(model)] == ["0"]


def test_the_call_that_gives_torchvisions_detectors_our_norms():
    """As norm_layer of fasterrcnn_resnet50_fpn they are ignored."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=PracticalGroupNorm)
    model = FasterRCNN(backbone, num_classes=3)
    norms = [m for m in model.modules() if isinstance(m, (PracticalGroupNorm, nn.BatchNorm2d))]
    assert len(norms) == 20 and all(isinstance(m, PracticalGroupNorm) and m.num_groups for m in norms)
    assert not unbound_norms(model)


def test_a_norm_that_cannot_follow_its_layer_is_named_by_its_path():
    def build(norm):
        stem = nn.Sequential(nn.Conv2d(3, 64, 1), get_norm(norm, 64))
        return nn.ModuleDict({"stem": stem, "head": nn.Sequential(nn.Linear(4, 64), get_norm(norm, 64))})

    with pytest.raises(InputError, match=r"^stem.1 and 1 more: GN3 cannot follow Conv2d\(3, 64\): "):
        build_naming_norms(build, "GN3")
    with pytest.raises(
        InputError, match=r"^head.1: GN\+WS cannot follow a torch\.nn\.modules\.linear\.Linear: only the Conv2d"
    ):
        build_naming_norms(build, "GN+WS")
    assert isinstance(build_naming_norms(build, "GN")["stem"][0], nn.Conv2d)
    with pytest.raises(InputError, match="^GN3 cannot follow"):  # of its own build, at once
        build("GN3")


def test_a_norm_that_was_bound_to_another_layer_in_the_end_is_no_error():
    def build():
        norm = GroupNorm(8, 64, weight_standardization=True)
        nn.Sequential(nn.Linear(4, 64), norm)
        return nn.Sequential(nn.Conv2d(4, 64, 1), norm)

    assert isinstance(build_naming_norms(build)[0], WSConv2d)


class Delegates(nn.Module):
    """What peft's modules_to_save and speechbrain's wrappers do: attributes are those of the module inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)  # endless before the module inside is there

    def forward(self, x):
        return self.inner(x)


def test_a_wrapper_that_delegates_its_attributes():
    wrapped = Delegates(pgn())
    assert wrapped.num_groups is None
    assert unbound_norms(nn.Sequential(nn.Conv2d(24, 8, 1), wrapped)) == ["1.inner"]
    model = nn.Sequential(Delegates(nn.Conv2d(24, 8, 1)), pgn(), nn.Sequential(nn.Conv2d(24, 8, 1), pgn()))
    assert unbound_norms(model) == ["1"] and model[2][1].num_groups == 4
    model.load_state_dict(Delegates(model).inner.state_dict())
    Delegates(nn.Sequential(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8)))


def test_properties_of_the_class_are_read_and_may_fail():
    class Layer(nn.Module):
        in_channels = property(lambda self: self.inner.in_channels)
        out_channels = property(lambda self: self.inner.out_channels)
        weight = property(lambda self: self.inner.weight)

        def __init__(self):
            super().__init__()
            self.first = pgn()  # while there is no layer inside
            self.inner = nn.Conv2d(24, 8, 1)

    layer = Layer()
    assert layer.first.num_groups is None
    del layer.first
    assert nn.Sequential(layer, pgn())[1].num_groups == 4


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Lazy")
@pytest.mark.parametrize(
    "change, groups",
    [
        pytest.param(lambda layer: nn.utils.parametrizations.weight_norm(layer), 4, marks=PARAMETRIZED_WEIGHT_NORM),
        (nn.utils.parametrizations.spectral_norm, 4),
        (nn.utils.weight_norm, 4),
        (nn.utils.spectral_norm, 4),
        (lambda layer: nn.LazyConv2d(8, 1), None),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), 4),
    ],
)
def test_layers_with_a_weight_of_another_kind(change, groups):
    assert nn.Sequential(change(nn.Conv2d(24, 8, 1)), pgn())[1].num_groups == groups


def test_the_message_names_the_class_with_its_module():
    class Conv2d(nn.Conv2d):  # of somebody else
        pass

    with pytest.raises(InputError, match=r"PGN\+WS cannot follow a tests\.layers\.test_binding\.\S*Conv2d: only"):
        nn.Sequential(Conv2d(24, 8, 1), get_norm("PGN+WS", 8))
