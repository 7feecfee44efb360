import pytest

from gng_d2.groups import practical_num_groups
from study import channels
from study.detector_norms import _layers


@pytest.mark.slow
def test_channels_of_every_layer(tmp_path):
    """They are compared with study.detector_norms, which computes them without a model."""
    rows = channels.measure(["GN", "GN1", "PGN"])
    found = {norm: sorted(r.channels_per_group for r in rows if r.norm == norm) for norm in ("GN", "GN1", "PGN")}
    box_head = [(1, 256, 256, ())] * 4
    backbone_and_fpn = [layer for layer in _layers(64, 64) if layer[0] == 1][:61]
    shapes = [(n_in, n_out) for _, n_in, n_out, _ in [*backbone_and_fpn, *box_head]]
    assert found["GN1"] == sorted(n_out for _, n_out in shapes)
    assert found["GN"] == sorted(n_out // 32 for _, n_out in shapes)
    assert found["PGN"] == sorted(n_out // practical_num_groups(n_in, n_out) for n_in, n_out in shapes)
    parts = [row.part for row in rows if row.norm == "GN"]
    assert list(dict.fromkeys(parts)) == ["stem", "res2", "res3", "res4", "res5", "FPN", "box head"]
    channels.draw(rows, str(tmp_path / "channels.png"))
    assert "| GN1 " in channels.table(rows) and (tmp_path / "channels.png").stat().st_size > 1000
