import json
from dataclasses import asdict

import pytest
import ready_process
from torch import nn

from gng_d2 import PracticalGroupNorm, practical_num_groups, unbound_norms
from gng_d2.errors import InputError
from gng_d2.job.build import bind_remaining_norms, build_on_meta
from gng_d2.job.config import load_config
from gng_d2.models.norm_table import norm_summary, norm_table
from gng_d2.predict.pictures import plot_groups

KEYS = [
    "name",
    "norm",
    "layer",
    "n_in",
    "n_out",
    "num_groups",
    "channels_per_group",
    "ideal_num_groups",
    "isometry_ratio",
    "weight_standardized",
]
EVERYWHERE = ["MODEL.RESNETS.NORM", "PGN", "MODEL.FPN.NORM", "PGN"]
# (n_in, n_out) of the layers of R-50 and of FPN -> groups
R50 = {
    (3, 64): 1,
    (64, 64): 1,
    (64, 256): 1,
    (256, 64): 64,
    (256, 128): 32,
    (128, 128): 1,
    (128, 512): 1,
    (256, 512): 1,
    (512, 128): 128,
    (512, 256): 64,
    (256, 256): 1,
    (256, 1024): 1,
    (512, 1024): 1,
    (1024, 256): 256,
    (1024, 512): 128,
    (512, 512): 1,
    (512, 2048): 1,
    (1024, 2048): 1,
    (2048, 512): 512,
}
FPN = {(256, 256): 1, (512, 256): 64, (1024, 256): 256, (2048, 256): 256}


def rows(*overrides):
    return norm_table(build_on_meta(load_config("configs/pfpn_pgn.yaml", overrides)))


def test_panoptic_fpn_as_configured():
    table = rows()
    assert all(list(asdict(row)) == KEYS for row in table)
    head = [row for row in table if row.name.startswith("sem_seg_head")]
    assert sorted((r.n_in, r.n_out, r.num_groups) for r in head) == [(128, 128, 1)] * 3 + [(256, 128, 32)] * 4
    assert all(r.norm == "PGN" and r.layer + ".norm" == r.name for r in head)
    assert all(r.channels_per_group == 128 // r.num_groups for r in head)
    assert {r.isometry_ratio for r in head} == {1, 1.03125} and {r.ideal_num_groups for r in head} == {32, 0}
    backbone = [row for row in table if row.name.startswith("backbone")]
    assert len(backbone) == 53
    assert all(r.norm == "FrozenBN" and r.num_groups is None and r.isometry_ratio is None for r in backbone)


def test_panoptic_fpn_with_pgn_everywhere():
    table = rows(*EVERYWHERE)
    lateral = {(r.n_in, r.n_out): r.num_groups for r in table if "fpn_lateral" in r.name}
    assert lateral == FPN
    bottom_up = {(r.n_in, r.n_out, r.num_groups) for r in table if "bottom_up" in r.name}
    assert bottom_up == {(*shape, groups) for shape, groups in R50.items()}


@pytest.mark.parametrize("norm, groups", [("GN", 32), ("GN1", 1), ("GN16", 16), ("LN", 1)])
def test_other_norms_are_listed_too(norm, groups):
    head = [r for r in rows("MODEL.SEM_SEG_HEAD.NORM", norm) if r.name.startswith("sem_seg_head")]
    assert {r.norm for r in head} == {norm} and {r.num_groups for r in head} == {groups}
    assert {r.isometry_ratio for r in head} == {(128 + 4 * groups) / 256, (128 + 4 * groups) / 128}


def test_the_lower_panel_has_k_only_where_a_norm_has_groups(monkeypatch):
    figures = []
    monkeypatch.setattr("gng_d2.predict.pictures.save_figure", lambda figure, path, dpi: figures.append(figure))
    table = rows()
    plot_groups(table, "")
    plot_groups([row for row in table if row.num_groups is None], "")  # and no legend of nothing
    with_groups = [i for i, row in enumerate(table) if row.num_groups is not None]
    assert len(with_groups) == 7 < len(table)
    drawn = {line.get_label(): line for line in figures[0].axes[1].lines if not line.get_label().startswith("_")}
    assert drawn.keys() == {"GN", "GN1", "PGN"}
    assert all(list(line.get_xdata()) == with_groups for line in drawn.values())
    assert list(drawn["PGN"].get_ydata()) == [table[i].isometry_ratio for i in with_groups]
    assert len(figures[1].axes[1].lines) == 1 and figures[1].axes[1].get_legend() is None


@pytest.mark.slow
def test_tool(tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    words = ["--config-file", "configs/pfpn_pgn.yaml", "--json", str(out), "--plot", str(plot), *EVERYWHERE]
    done = ready_process.run("tools/analyze_groups.py", words)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == [asdict(row) for row in rows(*EVERYWHERE)]
    assert "sem_seg_head.p2.0.norm" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tool_says_what_is_wrong_in_a_line():
    words = ["--config-file", "configs/pfpn_pgn.yaml", "MODEL.FPN.NORM", "PGGN"]
    done = ready_process.run("tools/analyze_groups.py", words)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("error: MODEL.FPN.NORM: unknown norm 'PGGN'")
    assert "Traceback" not in done.stderr


def test_a_line_says_how_many_norms_have_how_many_groups():
    line = norm_summary(build_on_meta(load_config("configs/pfpn_pgn.yaml")))
    assert line == "60 norms: 3 x 1, 4 x 32 groups; 53 x FrozenBN"


class Reordered(nn.Module):
    """A model of Detectron2's kind whose norms are registered before their convolutions."""

    def __init__(self):
        super().__init__()
        self.bn = PracticalGroupNorm(16)
        self.conv = nn.Conv2d(3, 64, 1)
        self.neck = nn.Conv2d(64, 16, 1)

    def forward(self, batch):
        return self.bn(self.neck(self.conv(batch[0]["image"][None])))


def test_norms_that_met_no_layer_are_bound_on_a_blank_image(caplog):
    model = bind_remaining_norms(Reordered())
    assert (model.bn.num_groups, model.bn.in_channels) == (practical_num_groups(64, 16), 64)


def test_a_model_that_takes_no_image_keeps_its_open_norms_and_says_so(caplog):
    model = bind_remaining_norms(nn.Sequential(PracticalGroupNorm(16)))
    assert unbound_norms(model) == ["0"] and "stay unbound" in caplog.text


def test_the_table_prints_as_one():
    lines = str(rows("MODEL.RESNETS.NORM", "PGN")).splitlines()
    assert lines[0].split() == [
        "name",
        "norm",
        "layer",
        "n_in",
        "n_out",
        "groups",
        "channels/group",
        "ideal",
        "K",
        "WS",
    ]
    stem = next(line.split() for line in lines if line.startswith("backbone.bottom_up.stem.conv1.norm"))
    assert stem[1:] == ["PGN", "backbone.bottom_up.stem.conv1", "3", "64", "1", "64", "-15.25", "22.6667", "False"]


def test_a_norm_that_cannot_follow_its_layer_has_its_path_in_the_message():
    cfg = load_config("configs/quick/pfpn_pgn.yaml", ["MODEL.RESNETS.NORM", "GN3"])
    with pytest.raises(InputError, match=r"^backbone.bottom_up.stem.conv1.norm and \d+ more: GN3 cannot follow Conv2d"):
        build_on_meta(cfg)


def test_a_module_that_names_its_sizes_and_its_norm_before_its_layer():
    class Separable(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.in_channels, self.out_channels, self.kernel_size = 24, 16, 3
            self.norm, self.conv = norm, nn.Conv2d(24, 16, 3)

    for norm in (nn.BatchNorm2d(16), nn.GroupNorm(4, 16)):
        (row,) = norm_table(nn.Sequential(Separable(norm)))
        assert (row.name, row.n_in, row.n_out) == ("0.norm", 24, 16)
