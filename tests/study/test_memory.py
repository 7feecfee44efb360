"""The memory of training steps: what is counted, its ratios, and a measurement that goes on."""

import pytest
import torch

from study import memory
from study.memory import MemoryRow, allocated
from study.rows import read_rows

SMALL = [
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "5"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
]


@pytest.mark.slow
def test_what_is_left_and_what_was_at_most():
    mebi = 2**20 // 4  # floats

    def call():
        kept = torch.zeros(3 * mebi)
        torch.ones(5 * mebi)  # and freed
        return kept

    result, left, most, op = allocated(call, "cpu")
    assert (result.numel(), left, most, op) == (3 * mebi, 3 * 2**20, 8 * 2**20, "aten::ones")
    held = [result]
    del result
    _, change, most, _ = allocated(held.clear, "cpu")
    assert (change, most) == (-3 * 2**20, 0)


@pytest.fixture
def few_norms(monkeypatch):
    monkeypatch.setattr(memory, "NORMS", ("FrozenBN", "PGN+WS"))


@pytest.mark.slow
def test_rows_and_resuming(few_norms, reproduce, tmp_path, monkeypatch):
    path = tmp_path / "memory.json"
    words = "memory", "--models", "pfpn", "--size", 64, 96, "--device", "cpu", "--json", path, "--resume"
    printed = reproduce(*words, *SMALL)
    rows = read_rows(path, MemoryRow)
    ways = [(False, False), (True, False), (False, True), (True, True)]
    assert [(row.norm, row.recomputed, row.fused) for row in rows] == [
        ("FrozenBN", False, False), *(("PGN+WS", *way) for way in ways)
    ]  # fmt: skip
    frozen_bn, kept, recomputed, fused, both = rows
    assert both.forward_bytes < fused.forward_bytes <= kept.forward_bytes and both.forward_bytes < kept.forward_bytes
    assert (frozen_bn.backbone_ratio, frozen_bn.forward_ratio, frozen_bn.peak_ratio) == (1, 1, 1)
    assert kept.backbone_ratio == kept.backbone_bytes / frozen_bn.backbone_bytes
    assert kept.peak_ratio == kept.peak_bytes / frozen_bn.peak_bytes
    assert recomputed.backbone_bytes < kept.backbone_bytes / 2 and recomputed.forward_bytes < kept.forward_bytes
    assert kept.forward_bytes <= kept.peak_bytes and kept.peak_in.split()[0] in ("forward", "backward", "optimizer")
    assert "backbone_mib" in printed and "step_milliseconds" not in printed

    measured = []
    job = memory.Job
    monkeypatch.setattr(memory, "Job", lambda cfg, *rest: measured.append(cfg.MODEL.RESNETS.NORM) or job(cfg, *rest))
    memory.write_rows(path, rows[:2])
    assert reproduce(*words, *SMALL).splitlines()[:2] == printed.splitlines()[:2]
    assert measured == ["PGN+WS"] * 3
    assert [row.peak_bytes for row in read_rows(path, MemoryRow)[:2]] == [row.peak_bytes for row in rows[:2]]


@pytest.mark.slow
def test_step_times_are_ratios_of_pairs(few_norms, monkeypatch):
    rows = list(memory.memory_rows("faster_rcnn", 1, 64, 96, "cpu", SMALL))
    pairs = []
    monkeypatch.setattr(
        memory, "milliseconds", lambda calls, *_: pairs.append(len(calls)) or [8.0, 10.0, 6.0, 9.0][: len(calls)]
    )
    times = list(memory.with_step_times(rows, "cpu", 0.0))
    assert [(row.step_milliseconds, row.step_ratio) for row in times] == [
        *((8, None), (8, None), (10, 1.25), (6, 0.75), (9, 1.125))
    ]  # fmt: skip
    assert pairs == [1, 4] and [row.peak_bytes for row in times] == [row.peak_bytes for row in rows]


def test_step_times_that_are_there_stay(monkeypatch):
    monkeypatch.setattr(memory, "Job", None)  # would be called
    row = MemoryRow("pfpn", "GN", False, 1, [64, 96], [], 1, 1.0, 1, 1.0, 1, 1.0, "forward", 8.0, None, 4, 2.0, "here")
    assert list(memory.with_step_times([row], "cpu", 1.0)) == [row]


@pytest.mark.parametrize("most", [0, 1, 2, 3, 11, 16])
def test_as_many_images_as_fit(most, monkeypatch):
    class Job:
        def __init__(self, cfg, recomputed, fused, images, height, width):
            self.batch, self.optimizer = range(images), torch.optim.SGD([torch.zeros(1)], lr=0.1)

        def step(self):
            if len(self.batch) > most:
                raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(memory, "Job", Job)
    monkeypatch.setattr(memory, "random_batch", lambda cfg, images, height, width: range(images))
    monkeypatch.setattr(memory, "milliseconds", lambda calls, device, seconds: [500.0])
    assert memory._most_images(None, False, False, 64, 96) == (most, most / 0.5 if most else None)
