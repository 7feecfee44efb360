import copy
import re
import subprocess
import sys

import detectron2.layers
import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.layers.batch_norm import FrozenBatchNorm2d
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gng_d2
from gng_d2.layers.norm_names import extend_get_norm, norm_name
from gng_d2.models.norm_table import norm_table


def test_our_names():
    assert type(get_norm("PGN", 64)) is gng_d2.PracticalGroupNorm
    assert type(get_norm("LGN", 64)) is gng_d2.LearnedGroupNorm
    for name, groups in [("GN1", 1), ("GN16", 16), ("GN64", 64)]:
        norm = get_norm(name, 64)
        assert isinstance(norm, nn.GroupNorm) and norm.num_groups == groups
    get_norm("GN64", 32)  # what RetinaNet and FCOS do while they are built


@pytest.mark.parametrize(
    "channels, width, groups",
    [
        *((16, 64, 4), (16, 256, 16), (1, 48, 48), (64, 64, 1), (6, 36, 6)),
        *((16, 24, 2), (6, 32, 4), (2, 7, 7)),  # nearest in log2: 12, not 24; 8, not 4; 1, not 7
        *((8, 4, 1), (200, 6, 1)),  # more than the layer has
    ],
)
def test_channels_per_group(channels, width, groups):
    norm = get_norm(f"GN/{channels}", width)
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == groups


def test_channels_per_group_keep_their_name():
    for name in ("GN/4", "GN/4+WS"):  # with 32 groups, as GN has
        conv = Conv2d(64, 128, 3, norm=get_norm(name, 128))
        model = nn.ModuleDict({"conv": conv})
        assert [(row.norm, row.num_groups) for row in norm_table(model)] == [(name, 32)]
        assert f"num_groups=32 ({name})" in repr(model)
        assert isinstance(conv, gng_d2.WSConv2d) == name.endswith("+WS")
        assert copy.deepcopy(conv).norm.norm_name() == name


def test_names_of_norms_that_no_config_made():
    norms = nn.GroupNorm(32, 64), nn.GroupNorm(4, 64), nn.SyncBatchNorm(64), nn.LayerNorm(64), nn.InstanceNorm2d(64)
    assert [norm_name(norm) for norm in norms] == ["GN", "GN4", "SyncBN", "LN", "InstanceNorm2d"]


def test_detectron2s_own_stay_as_they_are():
    assert get_norm("", 8) is None and get_norm(None, 8) is None
    assert type(get_norm("FrozenBN", 8)) is FrozenBatchNorm2d
    gn = get_norm("GN", 64)
    assert type(gn) is gng_d2.GroupNorm and gn.num_groups == 32 and norm_name(gn) == "GN"
    assert get_norm(nn.BatchNorm2d, 8).num_features == 8
    assert type(get_norm(gng_d2.PracticalGroupNorm, 8)) is gng_d2.PracticalGroupNorm


@pytest.mark.parametrize(
    "name, near",
    [
        ("PGM", "PGN"),
        ("pgn", "PGN"),
        ("bn", "BN"),
        ("frozenbn", "FrozenBN"),
        ("SyncBM", "SyncBN"),
        ("ln", "LN"),
        ("GN0", "GN"),
        ("GN-4", "GN"),
        ("GN/0", "GN/1"),
        ("gn/8+ws", "GN/1+WS"),
    ],
)
def test_unknown_name_lists_the_known_and_the_nearest(name, near):
    with pytest.raises(
        ValueError,
        match=rf"unknown norm '{re.escape(name)}'; did you mean '{re.escape(near)}.*PGN, LGN, GN<k>, GN/<c>.*FrozenBN",
    ):
        get_norm(name, 64)


@pytest.mark.parametrize("name", ["InstanceNorm", "swish", "?", "nothing"])
def test_nothing_is_suggested_where_nothing_is_near(name):
    with pytest.raises(ValueError, match=rf"unknown norm '{re.escape(name)}'\. Known norms: PGN, ") as error:
        get_norm(name, 64)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("name", ["GN", "GN1", "GN16", "GN/4", "PGN", "LN", "BN", "FrozenBN", "SyncBN"])
@pytest.mark.parametrize("suffix", ["", "+WS"])
def test_from_a_name_to_a_norm_and_back(name, suffix):
    if suffix and "N" in name[1:] and not name.startswith(("GN", "PGN")):
        with pytest.raises(ValueError, match="unknown norm"):
            get_norm(name + suffix, 64)
        return
    norm = get_norm(name + suffix, 64)
    assert norm_name(norm) == name + suffix
    assert not hasattr(norm, "norm_name") or norm.norm_name() == name + suffix


@given(st.sampled_from(["PGN", "GN", "GN{}", "GN/{}"]), st.integers(1, 10**6), st.booleans(), st.integers(1, 4096))
def test_the_name_of_any_norm_of_ours_makes_it_again(form, number, standardized, width):
    name = form.format(number) + "+WS" * standardized
    norm = get_norm(name, width)
    again = get_norm(norm_name(norm), width)
    assert norm_name(norm) == ("GN" + name[4:] if re.fullmatch(r"GN32(\+WS)?", name) else name)
    assert (type(again), again.num_groups, again.weight_standardization) == (type(norm), norm.num_groups, standardized)


@given(st.text("PGN/+WS0123 4k", max_size=8))
def test_any_other_text_is_an_error_that_repeats_it(text):
    if text and not re.fullmatch(r"(PGN|GN([1-9]\d*)?|GN/[1-9]\d*)(\+WS)?", text):
        with pytest.raises(ValueError, match=re.escape(f"unknown norm {text!r}")):
            get_norm(text, 64)


def test_gn_that_does_not_divide_names_its_layer():
    with pytest.raises(ValueError, match=r"GN cannot follow Conv2d\(3, 48\): its 48 output channels"):
        Conv2d(3, 48, 1, norm=get_norm("GN", 48))
    with pytest.raises(ValueError, match=r"GN3 cannot follow Conv2d\(3, 64\)"):
        Conv2d(3, 64, 1, norm=get_norm("GN3", 64))


def test_a_key_error_of_a_users_own_norm_is_its_own():
    def broken(channels):
        return {}["mine"]

    with pytest.raises(KeyError, match="mine"):
        get_norm(broken, 8)


def test_extending_twice_does_no_harm():
    before = get_norm.gng_d2_original
    extend_get_norm()
    assert get_norm.gng_d2_original is before and detectron2.layers.get_norm is get_norm
    assert get_norm("PGN", 8).num_channels == 8


def test_a_get_norm_that_another_package_replaced_is_named(monkeypatch):
    outer = detectron2.layers.get_norm

    def replaced(norm, out_channels):
        return outer(norm, out_channels)

    monkeypatch.setattr("detectron2.layers.batch_norm.get_norm", replaced)
    with pytest.raises(ValueError, match=f"was replaced by {__name__}.*Import gng_d2 before {__name__}"):
        extend_get_norm()
    assert replaced("BN", 8).num_features == 8


PROGRAM = """
{first}
{second}
import gng_d2
from detectron2.modeling.backbone import fpn, resnet
from detectron2.modeling.roi_heads import box_head
for module in (fpn, resnet, box_head):
    assert type(module.get_norm("PGN", 8)).__name__ == "PracticalGroupNorm"
print(resnet.BasicStem(3, 64, norm="PGN").conv1.norm)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["gng_d2 first", "detectron2 first"])
def test_import_order_makes_no_difference(order):
    imports = ["import gng_d2", "import detectron2.modeling, detectron2.projects.deeplab"]
    first, second = imports if order == "gng_d2 first" else imports[::-1]
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(first=first, second=second)],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert "num_groups=1, in_channels=3, from Conv2d(3, 64)" in out.stdout


@pytest.mark.slow
def test_imports_without_detectron2():
    program = (
        "import sys; sys.modules['detectron2'] = None; import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('detectron2') else find(name, *a)\n"
        "import gng_d2, torch; print(gng_d2.PracticalGroupNorm(64, 128).num_groups)\n"
        "norm = gng_d2.GroupNorm(2, 4, weight_standardization=True)\n"
        "conv = gng_d2.WSConv2d(3, 4, 3, norm=norm); conv(torch.ones(1, 3, 4, 4)).sum().backward()\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(64, 16, 1), torch.nn.ReLU(), gng_d2.PracticalGroupNorm(16))\n"
        "assert gng_d2.unbound_norms(model) == ['2']\n"
        "gng_d2.bind_norms(model.to('meta'), torch.ones(1, 64, 2, 2))\n"
        "assert gng_d2.norm_table(model)[0].num_groups == 1\n"
        "assert not [m for m in sys.modules if m.startswith(('torch._dynamo', 'detectron2.'))]"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert out.stdout.strip() == "16", out.stderr


def test_gn_computes_the_same_bits_as_without_this_package():
    x = torch.randn(1, 64, 128, 128)
    ours, theirs = get_norm("GN", 64), torch.nn.GroupNorm(32, 64)
    assert isinstance(ours, gng_d2.GroupNorm) and torch.equal(ours(x), theirs(x))
    x.requires_grad_()
    same = [torch.autograd.grad(norm(x).cos().sum(), (x, norm.weight)) for norm in (ours, theirs)]
    assert all(map(torch.equal, *same))
    assert get_norm("GN16", 64).uses_kernels and get_norm("GN+WS", 64).uses_kernels
