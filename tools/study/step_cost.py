"""What a whole training step costs under FrozenBN, GN, GN+WS, PGN and PGN+WS: Faster R-CNN and Panoptic FPN.

Forward, backward and optimizer, on noise with eight objects an image; the norm is in backbone, FPN and semantic head,
all layers are trained. GN and GN+WS run a second time with the kernels of gng_d2 turned off, in PyTorch's own ops, PGN
and PGN+WS with fuse_norms, PGN+WS with recompute_norms, too. The models of a table run in turn, in one run: medians, to
be read as ratios. Peak memory is a model's own, on CUDA alone. The share of weight standardization is its time, alone,
over that of the step.
"""

import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import truediv
from statistics import median
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from tqdm import tqdm

from command_line import add_outputs, add_overrides
from gng_d2.errors import InputError
from gng_d2.job.config import load_config
from gng_d2.job.files import prepare_outputs
from gng_d2.layers import WSConv2d
from gng_d2.models.fuse_norms import fuse_norms
from gng_d2.models.recompute_norms import recompute_norms
from gng_d2.ops import set_kernels_enabled
from gng_d2.ops.weight_standardization import standardize_weight

from .rows import machine, markdown, rows_to_keep, write_rows
from .timing import add_timing, keep_freed_memory, milliseconds, ratio_quartiles, rounds

MODELS = {
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "pfpn": "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml",
}
NORMS = ("FrozenBN", "GN", "GN+WS", "PGN", "PGN+WS")


class Setup(NamedTuple):
    """How the norms of a model run."""

    norm: str
    kernels: bool = True  # of gng_d2; False: turned off, so that PyTorch's own ops run
    fused: bool = False  # by fuse_norms
    recomputed: bool = False  # by recompute_norms


SETUPS = (
    *map(Setup, NORMS),
    *(Setup(norm, kernels=False) for norm in ("GN", "GN+WS")),
    *(Setup(norm, fused=True) for norm in ("PGN", "PGN+WS")),
    *(Setup("PGN+WS", fused=fused, recomputed=True) for fused in (False, True)),
)


@dataclass(frozen=True)
class StepCostRow:
    """A model's training step under one norm."""

    model: str  # one of MODELS
    norm: str
    amp: bool  # in mixed precision
    images: int
    size: list[int]  # height and width, pixels
    step_milliseconds: float  # the median
    ratio_to_frozen_bn: float
    ratio_to_gn: float
    peak_memory_bytes: int | None  # what model and optimizer hold, and what a step adds; None on a CPU
    memory_ratio_to_gn: float | None
    share_of_weight_standardization: float
    machine: str
    kernels: bool = True  # this and the next two as in Setup
    # of the ratio, in a round, to GN (for a norm with +WS: to GN+WS) in PyTorch's own ops; None in older rows
    quartiles_to_pytorch: list[float] | None = None
    overrides: Sequence[str] = ()
    fused: bool = False
    recomputed: bool = False
    ratio_to_kept: float | None = None  # the median ratio, in a round, of a recomputed one to the same without

    def setup(self) -> Setup:
        return Setup(self.norm, self.kernels, self.fused, self.recomputed)

    def key(self) -> tuple:
        return self.model, self.amp, self.images, tuple(self.size), tuple(self.overrides)


def config_of(model: str, norm: str, device: str, overrides=()) -> CfgNode:
    """Detectron2's own R-50-FPN config, from scratch, all layers trained, ``norm`` in backbone, FPN, semantic head.

    With FrozenBN the FPN has no norm and the semantic head GN, as in Detectron2's configs.
    """
    norms = {"MODEL.RESNETS.NORM": norm}
    if norm != "FrozenBN":
        norms |= {"MODEL.FPN.NORM": norm, "MODEL.SEM_SEG_HEAD.NORM": norm}
    words = [word for pair in norms.items() for word in pair]
    scratch = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.DEVICE", device]
    return load_config(MODELS[model], [*scratch, *words, *overrides])


def random_batch(cfg: CfgNode, images: int, height: int, width: int, seed: int = 0) -> list[dict]:
    """A batch of noise with eight objects an image, in the format of Detectron2's training loader."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    batch = []
    for _ in range(images):
        corner = torch.stack([draw(0, width * 3 // 4, 8), draw(0, height * 3 // 4, 8)], 1)
        size = torch.stack([draw(width // 16, width // 4, 8), draw(height // 16, height // 4, 8)], 1)
        masks = torch.zeros(8, height, width, dtype=torch.bool)
        for mask, (x, y), (w, h) in zip(masks, corner.tolist(), size.tolist()):
            mask[y : y + h, x : x + w] = True
        instances = Instances((height, width), gt_boxes=Boxes(torch.cat([corner, corner + size], 1).float()))
        instances.gt_classes = draw(0, cfg.MODEL.ROI_HEADS.NUM_CLASSES, 8)
        instances.gt_masks = BitMasks(masks)
        semantic = draw(0, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, height, width)
        image = draw(0, 256, 3, height, width).to(torch.uint8)
        batch.append({"image": image, "instances": instances, "sem_seg": semantic, "height": height, "width": width})
    return batch


def step_rows(
    model: str, amp: bool, images: int, height: int, width: int, device: str, seconds: float, overrides=()
) -> Iterator[StepCostRow]:
    """Time the steps under each norm in turn."""
    if device == "cuda":  # makes what all share, workspaces say
        _Job(config_of(model, "GN", device, overrides), amp, images, height, width, Setup("GN"))
    jobs = {
        setup: _Job(config_of(model, setup.norm, device, overrides), amp, images, height, width, setup)
        for setup in SETUPS
    }
    times = dict(zip(jobs, rounds([job.step for job in jobs.values()], device, seconds)))
    step = {setup: median(of_step) for setup, of_step in times.items()}
    peak = {setup: job.peak_memory() for setup, job in jobs.items()}
    frozen_bn, gn = Setup("FrozenBN"), Setup("GN")
    for setup, job in jobs.items():
        pytorch = Setup("GN+WS" if setup.norm.endswith("+WS") else "GN", kernels=False)
        kept = times[setup._replace(recomputed=False)]
        yield StepCostRow(
            model=model,
            norm=setup.norm,
            amp=amp,
            images=images,
            size=[height, width],
            step_milliseconds=step[setup],
            ratio_to_frozen_bn=step[setup] / step[frozen_bn],
            ratio_to_gn=step[setup] / step[gn],
            peak_memory_bytes=peak[setup],
            memory_ratio_to_gn=peak[setup] / peak[gn] if peak[gn] else None,
            share_of_weight_standardization=job.weight_standardization_milliseconds(device, seconds) / step[setup],
            machine=machine(device),
            kernels=setup.kernels,
            quartiles_to_pytorch=ratio_quartiles(times[setup], times[pytorch]),
            overrides=list(overrides),
            fused=setup.fused,
            recomputed=setup.recomputed,
            ratio_to_kept=median(map(truediv, times[setup], kept)) if setup.recomputed else None,
        )


def model_and_optimizer(cfg: CfgNode, fused: bool, recomputed: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model to train, and its optimizer, which has a learning rate of 0."""
    torch.manual_seed(0)
    model = DefaultTrainer.build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)  # without pretrained weights it normalizes nothing, and float16 overflows
    if recomputed:
        recompute_norms(model)
    if fused:
        fuse_norms(model)
    optimizer = DefaultTrainer.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return model, optimizer


class _Job:
    def __init__(self, cfg, amp, images, height, width, setup):
        before = _allocated(cfg)
        self.cfg, self.kernels = cfg, "cuda" if setup.kernels else "off"
        self.model, optimizer = model_and_optimizer(cfg, setup.fused, setup.recomputed)
        batch = itertools.repeat(random_batch(cfg, images, height, width))
        if amp:  # a scale of 1: where gradients overflow, the optimizer would skip its step
            scaler = torch.amp.GradScaler("cuda", init_scale=1.0)
            self.trainer = AMPTrainer(self.model, batch, optimizer, grad_scaler=scaler)
        else:
            self.trainer = SimpleTrainer(self.model, batch, optimizer)
        self.trainer.iter = 0
        for _ in range(3 if setup.recomputed else 1):  # in its first runs a recomputed block compares its outputs
            self.step()
        self.held = _allocated(cfg) - before

    def step(self):
        with EventStorage(), set_kernels_enabled(self.kernels):
            self.trainer.run_step()

    def peak_memory(self):
        if self.cfg.MODEL.DEVICE != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = _allocated(self.cfg)
        self.step()
        return self.held + torch.cuda.max_memory_allocated() - before

    def weight_standardization_milliseconds(self, device, seconds):
        weights = [layer.weight for layer in self.model.modules() if isinstance(layer, WSConv2d)]

        def standardize():
            with set_kernels_enabled(self.kernels):
                for weight in weights:
                    torch.autograd.grad(standardize_weight(weight), weight, weight.detach())

        return milliseconds([standardize], device, min(seconds, 1.0))[0] if weights else 0.0


def _allocated(cfg):
    if cfg.MODEL.DEVICE != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated()


def table(rows: list[StepCostRow]) -> str:
    """A line for each row; what was not measured has no column."""
    lines = [
        {
            **asdict(row),
            "norm": row.norm
            + ", PyTorch's ops" * (not row.kernels)
            + ", fused" * row.fused
            + ", recomputed" * row.recomputed,
            "size": f"{row.size[0]} x {row.size[1]}",
        }
        for row in rows
    ]
    hidden = ("machine", "kernels", "quartiles_to_pytorch", "overrides", "fused", "recomputed")
    headers = [key for key in lines[0] if key not in hidden and any(line[key] is not None for line in lines)]
    return markdown([[line[key] for key in headers] for line in lines], headers)


def add_arguments(parser) -> None:
    cuda = torch.cuda.is_available()
    add_outputs(parser, json="write a row for each model, precision, number of images and norm")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: both")
    add_timing(parser, seconds=10.0, images=[1, 2] if cuda else [1], each="model, at least three steps")
    parser.add_argument(
        "--precision", nargs="+", default=["float32", "amp"] if cuda else ["float32"], choices=["float32", "amp"],
        help="amp is float16 under autocast, on CUDA; default: both on CUDA",
    )  # fmt: skip
    add_overrides(parser)


def main(args) -> None:
    prepare_outputs(args.json)
    if args.device == "cpu" and "amp" in args.precision:
        raise InputError("--precision amp: Detectron2's AMP needs CUDA")
    keep_freed_memory()
    rows = rows_to_keep(args, StepCostRow)
    done = {row.key() for row in rows}
    jobs = [(m, p == "amp", i) for i in args.images for p in args.precision for m in args.models]
    for job in tqdm(jobs, unit="table"):
        if (*job, tuple(args.size), tuple(args.opts)) in done:
            continue
        try:
            rows += list(step_rows(*job, *args.size, args.device, args.seconds, args.opts))
        except torch.cuda.OutOfMemoryError as error:
            tqdm.write(f"{job} is left out: {error}")
            torch.cuda.empty_cache()
        write_rows(args.json, rows)
    print(table(rows) if rows else "nothing was measured")
