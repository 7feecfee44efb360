"""The memory of a training step under FrozenBN, GN, GN+WS, PGN and PGN+WS, with and without recompute_norms.

Faster R-CNN (4conv1fc box head) and Panoptic FPN, R-50-FPN, on noise with eight objects an image, stem and res2 frozen
as in fine-tuning; the norm is in backbone, FPN, box and semantic head. With FrozenBN the semantic head has GN, as in
Detectron2's configs. PGN and PGN+WS are measured with fuse_norms too. Bytes are what a step adds to what was alive
before it: CUDA's own counter, or on a CPU the allocations that PyTorch's profiler reports. --seconds adds step times,
each norm's in turn.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from command_line import add_outputs, add_overrides
from gng_d2.job.files import prepare_outputs

from .rows import machine, markdown, rows_to_keep, write_rows
from .step_cost import MODELS, NORMS, config_of, model_and_optimizer, random_batch
from .timing import add_timing, keep_freed_memory, milliseconds

_WAYS = ((False, False), (True, False), (False, True), (True, True))  # recomputed, fused
_COUNTS = {"FrozenBN": 1, "PGN": 4, "PGN+WS": 4}  # how many of them are measured; of other norms 2


@dataclass(frozen=True)
class MemoryRow:
    """A model's training step under one norm."""

    model: str  # one of MODELS
    norm: str
    recomputed: bool  # by recompute_norms
    images: int
    size: list[int]  # height and width, pixels
    overrides: list[str]  # KEY VALUE pairs
    backbone_bytes: int  # alive after the forward pass of backbone and FPN
    backbone_ratio: float  # to FrozenBN's
    forward_bytes: int  # alive after the forward pass of the whole model
    forward_ratio: float
    peak_bytes: int  # at most, in a whole step, with the optimizer
    peak_ratio: float
    peak_in: str  # forward, backward or optimizer; on a CPU also the op
    step_milliseconds: float | None  # the median; None where it was not measured
    step_ratio: float | None  # to that of the same norm neither recomputed nor fused
    most_images: int | None  # that fit on the GPU; None on a CPU
    images_per_second: float | None  # with so many
    machine: str
    fused: bool = False  # by fuse_norms

    def key(self) -> tuple:
        return self.model, self.norm, self.images, tuple(self.size), tuple(self.overrides), self.recomputed, self.fused


class Job:
    """A model with its optimizer and a batch, which stays the same."""

    def __init__(self, cfg: CfgNode, recomputed: bool, fused: bool, images: int, height: int, width: int):
        self.model, self.optimizer = model_and_optimizer(cfg, fused, recomputed)
        self.device = cfg.MODEL.DEVICE
        self.batch = random_batch(cfg, images, height, width)
        self.step()  # makes the optimizer's momentum

    def forward(self):
        with EventStorage():
            return sum(self.model(self.batch).values())

    def step(self):
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backbone_bytes(self) -> int:
        images = self.model.preprocess_image(self.batch).tensor
        return allocated(lambda: self.model.backbone(images), self.device)[1]

    def forward_bytes_and_peak(self) -> tuple[int, int, str]:
        """What is alive after the forward pass, what is at most in a step, and where."""
        loss, alive, peak, op = allocated(self.forward, self.device)
        forward_bytes, peaks = alive, [(peak, f"forward {op}")]
        for name, call in (("backward", loss.backward), ("optimizer", self.optimizer.step)):
            _, change, peak, op = allocated(call, self.device)
            peaks.append((alive + peak, f"{name} {op}"))
            alive += change
        self.optimizer.zero_grad()
        peak, where = max(peaks)
        return forward_bytes, peak, where.strip()


def allocated(call: Callable, device: str) -> tuple[object, int, int, str]:
    """What ``call`` returns, the bytes it leaves allocated while that is held, those at most, and in which op.

    The op, the outermost of PyTorch's, is known on a CPU alone. Negative where it frees more than it allocates.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before, ""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    alive = peak = when = 0
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            if alive > peak:
                peak, when = alive, event.start_ns()
    ops = (e.name() for e in events if e.start_ns() <= when <= e.end_ns() and e.name() != "[memory]")
    return result, alive, peak, next(ops, "")


def config(model: str, norm: str, device: str, overrides=()) -> CfgNode:
    """As :func:`.step_cost.config_of`, with the box head of Detectron2's GN models under FrozenBN too."""
    words = ["MODEL.BACKBONE.FREEZE_AT", "2"]
    if model == "faster_rcnn":
        words += ["MODEL.ROI_BOX_HEAD.NUM_CONV", "4", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"]
        words += ["MODEL.ROI_BOX_HEAD.NORM", "" if norm == "FrozenBN" else norm]
    return config_of(model, norm, device, [*words, *overrides])


def memory_rows(
    model: str, images: int, height: int, width: int, device: str, overrides=(), done=()
) -> Iterator[MemoryRow]:
    """Rows of each norm, without and with; FrozenBN's comes first, and without alone. Rows in ``done`` are kept."""
    done = {row.key(): row for row in done}
    frozen_bn = None
    for norm in NORMS:
        for recomputed, fused in _WAYS[: _COUNTS.get(norm, 2)]:
            row = done.get((model, norm, images, (height, width), tuple(overrides), recomputed, fused))
            if row is None:
                cfg = config(model, norm, device, overrides)
                job = Job(cfg, recomputed, fused, images, height, width)
                sizes = job.backbone_bytes(), *job.forward_bytes_and_peak()
                del job
                most, speed = _most_images(cfg, recomputed, fused, height, width) if device == "cuda" else (None, None)
                base = frozen_bn or sizes
                row = MemoryRow(
                    model=model,
                    norm=norm,
                    recomputed=recomputed,
                    images=images,
                    size=[height, width],
                    overrides=list(overrides),
                    backbone_bytes=sizes[0],
                    backbone_ratio=sizes[0] / base[0],
                    forward_bytes=sizes[1],
                    forward_ratio=sizes[1] / base[1],
                    peak_bytes=sizes[2],
                    peak_ratio=sizes[2] / base[2],
                    peak_in=sizes[3],
                    step_milliseconds=None,
                    step_ratio=None,
                    most_images=most,
                    images_per_second=speed,
                    machine=machine(device),
                    fused=fused,
                )
            frozen_bn = frozen_bn or (row.backbone_bytes, row.forward_bytes, row.peak_bytes)
            yield row


def _most_images(cfg, recomputed, fused, height, width):
    """How many images fit into a batch on the GPU, one step at a time, and images a second with so many."""
    job = Job(cfg, recomputed, fused, 1, height, width)

    def fits(images):
        try:
            job.batch = random_batch(cfg, images, height, width)
            job.step()
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            job.optimizer.zero_grad()
            torch.cuda.empty_cache()

    most, too_many = 1, 2
    while fits(too_many):
        most, too_many = too_many, 2 * too_many
    while too_many - most > 1:
        images = (most + too_many) // 2
        most, too_many = (images, too_many) if fits(images) else (most, images)
    while most and not fits(most):  # next to the limit memory in pieces may decide
        most -= 1
    if not most:
        return 0, None
    (time,) = milliseconds([job.step], "cuda", 1.0)
    return most, most / (time / 1e3)


def with_step_times(rows: list[MemoryRow], device: str, seconds: float) -> Iterator[MemoryRow]:
    """The same rows with the times of steps; each norm's run in turn. Rows that have theirs stay as they are."""
    groups = {}
    for row in rows:
        groups.setdefault(row.key()[:-2], []).append(row)
    for group in groups.values():
        if all(row.step_milliseconds is not None for row in group):
            yield from group
            continue
        jobs = [
            Job(config(row.model, row.norm, device, row.overrides), row.recomputed, row.fused, row.images, *row.size)
            for row in group
        ]
        for job in jobs * 2:  # in its first three runs, of which Job made one, a recomputed block compares its outputs
            job.step()
        times = milliseconds([job.step for job in jobs], device, seconds)
        for row, time in zip(group, times):
            is_other = row.recomputed or row.fused
            yield replace(row, step_milliseconds=time, step_ratio=time / times[0] if is_other else None)


def table(rows: list[MemoryRow]) -> str:
    """A line for each row, in MiB; what was not measured has no column."""
    lines = [asdict(row) for row in rows]
    for line in lines:
        line["size"] = f"{line['size'][0]} x {line['size'][1]}"
        line["overrides"] = " ".join(line["overrides"]) or None
        for key in [key for key in line if key.endswith("_bytes")]:
            line[key] = round(line[key] / 2**20)
    headers = [key for key in lines[0] if key != "machine" and any(line[key] is not None for line in lines)]
    titles = [key.replace("_bytes", "_mib") for key in headers]
    return markdown([[line[key] for key in headers] for line in lines], titles)


def add_arguments(parser) -> None:
    add_outputs(parser, json="write a row for each model, number of images, norm, without and with")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: both")
    add_timing(parser, seconds=0.0, images=[1], each="way of a norm's steps; 0: no times")
    add_overrides(parser)


def main(args) -> None:
    prepare_outputs(args.json)
    rows = {row.key(): row for row in rows_to_keep(args, MemoryRow)}

    def add(row):
        rows[row.key()] = row
        write_rows(args.json, rows.values())

    jobs = [(model, images) for images in args.images for model in args.models]
    with tqdm(total=len(jobs) * sum(_COUNTS.get(norm, 2) for norm in NORMS), unit="row") as bar:
        for model, images in jobs:
            for row in memory_rows(model, images, *args.size, args.device, args.opts, list(rows.values())):
                add(row)
                bar.update()
    if args.seconds:
        keep_freed_memory()
        for row in tqdm(with_step_times(list(rows.values()), args.device, args.seconds), total=len(rows), unit="time"):
            add(row)
    print(table(list(rows.values())))
