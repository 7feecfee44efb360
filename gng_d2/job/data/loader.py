"""Training data whose order and augmentation depend on the seed and the iteration alone.

Detectron2's own loader shuffles anew when a run resumes, and augments with whatever the random state is then. Here each
sample is seeded by its place in the stream, and a resumed run goes on where the interrupted one was. Images that waited
for a partner of their shape still wait then.
"""

import itertools
import logging
import operator
import random
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.build import (
    _train_loader_from_config,
    build_detection_train_loader,
    trivial_batch_collator,
)
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from .checks import check_records, map_values, naming_datasets
from .images import NamingMapper, read_image

Place = tuple[int, int]  # in the stream, in the dataset
AUGMENTATION, STEP = 0, 1  # enter the seeds, so that augmentation and step draw different numbers


def seed_everything(*seeds: int, seed_torch: Callable = torch.manual_seed) -> None:
    """Seed Python, NumPy and PyTorch by a few numbers together, for instance (seed, rank, iteration)."""
    state = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    seed_torch(state)


@contextmanager
def _seeded(*seeds):
    """Seed what the CPU draws inside, and leave the random states outside as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        seed_everything(*seeds, seed_torch=torch.default_generator.manual_seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_step(cfg: CfgNode, iteration: int) -> None:
    """Seed what the model draws in a training step (proposals) by seed, process and iteration."""
    seed_everything(cfg.SEED, comm.get_rank(), STEP, iteration)


class SeededDataset(Dataset):
    """Maps the record at each place of the stream. Its random numbers depend on ``seeds`` and the place alone."""

    def __init__(self, records: list[dict], mapper: Callable, *seeds: int):
        # serialized, so that worker processes share it
        self.records = DatasetFromList(records, copy=False)
        self.mapper, self.seeds = mapper, seeds

    def __getitem__(self, place: Place):
        position, index = place
        with _seeded(*self.seeds, position):
            return self.mapper(self.records[index])


class PlaceSampler:
    """The places of a sampler's stream; ``start`` leaves out those that a resumed run has had."""

    def __init__(self, sampler, start: Callable[[Iterator[Place]], Iterator[Place]]):
        self.sampler, self.start = sampler, start

    def __iter__(self):
        return iter(self.start(enumerate(self.sampler)))


def after_batches(
    places: Iterator[Place], shape: Callable[[int], Hashable], batch_size: int, num_batches: int
) -> Iterator[Place]:
    """What is left of a stream after ``num_batches`` batches, each of images of one ``shape(index)``. First come those
    that were drawn and still wait for a partner, then the rest."""
    waiting = {}
    while num_batches:
        place = next(places)
        group = waiting.setdefault(shape(place[1]), [])
        group.append(place)
        if len(group) == batch_size:
            group.clear()
            num_batches -= 1
    return itertools.chain(sorted(itertools.chain.from_iterable(waiting.values())), places)


def build_train_loader(cfg: CfgNode):
    """The loader of Detectron2's ``build_detection_train_loader(cfg)``: the same dataset, sampler, mapper and batches.

    With a SEED of 0 or more, every run gets the same batches, whatever DATALOADER.NUM_WORKERS is.
    """
    if cfg.SEED >= 0:
        seed_everything(cfg.SEED)  # from which all processes take the sampler's seed
    with naming_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN):
        parts = _train_loader_from_config(cfg)
    check_records(cfg, parts["dataset"], parts["mapper"])
    _take_rle_masks(parts["dataset"], parts["mapper"])
    parts["mapper"] = NamingMapper(parts["mapper"], map_values(cfg))
    if cfg.SEED < 0:
        return build_detection_train_loader(**parts)

    dataset = SeededDataset(parts["dataset"], parts["mapper"], cfg.SEED, comm.get_rank(), AUGMENTATION)
    grouped = parts["aspect_ratio_grouping"]
    batch_size = parts["total_batch_size"] // comm.get_world_size()

    @cache
    def shape(index):
        return _is_wide(dataset.records[index]) if grouped else None

    loader = DataLoader(
        dataset,
        sampler=PlaceSampler(
            parts["sampler"], partial(after_batches, shape=shape, batch_size=batch_size, num_batches=0)
        ),
        batch_size=1 if grouped else batch_size,
        collate_fn=operator.itemgetter(0) if grouped else trivial_batch_collator,
        num_workers=parts["num_workers"],
        # of its own, because the global one belongs to the training step
        generator=torch.Generator().manual_seed(cfg.SEED),
    )
    return AspectRatioGroupedDataset(loader, batch_size) if grouped else loader


def start_at(loader, iteration: int) -> None:
    """Let a loader of :func:`build_train_loader` with a SEED begin at ``iteration`` when it is next iterated.

    So a run that resumes loads its dataset only once.
    """
    sampler = (loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader).sampler
    sampler.start = partial(sampler.start, num_batches=iteration)


def _is_wide(record):
    """Whether an image is wide, by which Detectron2 groups them. Records of semantic datasets do not say the size."""
    if "width" in record:
        return record["width"] > record["height"]
    height, width = NamingMapper(lambda record: read_image(record["file_name"]))(record).shape[:2]
    return width > height


def _take_rle_masks(records, mapper):
    """Take run-length encoded masks, at which Detectron2 stops unless INPUT.MASK_FORMAT is bitmask."""
    if getattr(mapper, "use_instance_mask", False) and mapper.instance_mask_format == "polygon":
        annotations = itertools.chain.from_iterable(record.get("annotations", ()) for record in records)
        if any(isinstance(a.get("segmentation"), dict) and not a.get("iscrowd", 0) for a in annotations):
            logging.getLogger(__name__).info("masks are run-length encoded: taken as INPUT.MASK_FORMAT bitmask")
            mapper.instance_mask_format = "bitmask"
