import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset

from gng_d2.job.config import load_config
from gng_d2.job.data.loader import after_batches, build_train_loader, seed_step, start_at


@pytest.mark.parametrize("batch_size, skipped", [(1, 5), (2, 0), (2, 7), (4, 13)])
def test_what_is_left_is_what_grouping_would_go_on_with(batch_size, skipped):
    rng = random.Random(0)
    wide = [rng.random() < 0.7 for _ in range(50)]
    order = [rng.randrange(50) for _ in range(400)]

    def batches(places):
        records = ({"width": 2, "height": 1 + 2 * (not wide[i]), "place": (p, i)} for p, i in places)
        return [[r["place"] for r in batch] for batch in AspectRatioGroupedDataset(records, batch_size)]

    whole = batches(enumerate(order))
    left = after_batches(iter(enumerate(order)), wide.__getitem__, batch_size, skipped)
    assert batches(left) == whole[skipped:] and len(whole) > skipped + 10


def first_batches(count, start_iter=0, *overrides):
    cfg = load_config("configs/quick/pfpn_pgn.yaml", ["INPUT.MIN_SIZE_TRAIN", "(96, 128)", *overrides])
    loader = build_train_loader(cfg)
    if start_iter:
        start_at(loader, start_iter)
    batches = itertools.islice(loader, count)
    return [
        [(d["image_id"], tuple(d["image"].shape), int(d["image"].long().sum())) for d in batch] for batch in batches
    ]


@pytest.mark.slow
def test_order_and_augmentation_follow_from_seed_and_iteration(shapes):
    whole = first_batches(6)
    assert first_batches(6) == whole
    assert first_batches(3, 3) == whole[3:]
    assert first_batches(6, 0, "DATALOADER.NUM_WORKERS", "2") == whole
    ungrouped = first_batches(6, 0, "DATALOADER.ASPECT_RATIO_GROUPING", "False")
    assert first_batches(2, 4, "DATALOADER.ASPECT_RATIO_GROUPING", "False") == ungrouped[4:]
    assert first_batches(6, 0, "SEED", "2") != whole
    assert len({shape for batch in whole for _, shape, _ in batch}) == 2  # the scales are drawn


def test_step_and_augmentation_do_not_disturb_each_other(shapes):
    """What the model draws is the same whether images are made in this process or in workers."""
    drawn = []
    for workers in ("0", "2"):
        cfg = load_config("configs/quick/pfpn_pgn.yaml", ["DATALOADER.NUM_WORKERS", workers])
        loader = build_train_loader(cfg)
        seed_step(cfg, 5)
        next(iter(loader))
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]
    seed_step(cfg, 6)
    assert torch.rand(1).item() != drawn[0][0]


def test_resumes_on_a_semantic_dataset_whose_records_have_no_sizes(shapes):
    stuff = ["DATASETS.TRAIN", "('gng_shapes_train_stuffonly',)", "MODEL.META_ARCHITECTURE", "SemanticSegmentor"]
    stuff += ["MODEL.MASK_ON", "False"]
    cfg = load_config("configs/quick/pfpn_pgn.yaml", stuff)
    names = [[d["file_name"] for d in b] for b in itertools.islice(build_train_loader(cfg), 4)]
    loader = build_train_loader(cfg)
    start_at(loader, 2)
    assert [[d["file_name"] for d in b] for b in itertools.islice(loader, 2)] == names[2:]


def test_run_length_encoded_masks_are_taken_whatever_the_mask_format(shapes):
    assert first_batches(2, 0, "INPUT.MASK_FORMAT", "polygon") == first_batches(2)


def test_without_a_seed_the_order_is_detectron2s(shapes):
    batches = first_batches(2, 0, "SEED", "-1")
    assert [len(batch) for batch in batches] == [2, 2]
