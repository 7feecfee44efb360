"""Kill a small training job inside its checkpoint writes, resume it, and compare with a run that was never killed.

    python tests/job/kill_in_checkpoints.py FOLDER

A run is a fork of this process, so that nothing is imported twice. It saves 7 checkpoints, the last two after the
same step. It is killed, in the n-th, after a part of the file was written, or where last_checkpoint was opened.
"""

import builtins
import io
import itertools
import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from PIL import Image
from torch import nn

from gng_d2.job.engine import Trainer
from gng_d2.layers import PracticalGroupNorm

SAVES, PARTS = (0, 2, 5, 6), (0, 0.3, 0.999, 1, "last_checkpoint")


@META_ARCH_REGISTRY.register()
class Tiny(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), PracticalGroupNorm(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 3, 3)
        )

    def forward(self, batch):
        images = torch.stack([sample["image"] for sample in batch]) / 255
        return {"loss": (self.layers(images) - images[..., 2:-2, 2:-2]).square().mean()}


def register_dataset(folder):
    rng = np.random.default_rng(0)
    records = []
    for number in range(6):
        path = str(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
        box = {"bbox": [1, 1, 9, 9], "bbox_mode": 0, "category_id": 0}
        records.append({"file_name": path, "image_id": number, "height": 16, "width": 16, "annotations": [box]})
    DatasetCatalog.register("tiny", lambda: records)
    MetadataCatalog.get("tiny").thing_classes = ["thing"]


def config(folder):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "Tiny", "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.DATALOADER.NUM_WORKERS = ("tiny",), (), 0
    cfg.INPUT.MIN_SIZE_TRAIN = (16,)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.IMS_PER_BATCH = 12, 2, 2
    cfg.SOLVER.BASE_LR, cfg.SEED, cfg.OUTPUT_DIR = 0.1, 1, str(folder)
    return cfg


def train(folder, killed=None):
    """Run, or go on with, the job of ``folder`` in a process of its own; returns how that ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        torch.set_num_threads(1)
        sys.stdout = open(os.devnull, "w")
        if killed:
            kill_in(*killed)
        folder.mkdir(exist_ok=True)
        trainer = Trainer(config(folder))
        trainer.resume_or_load(resume=True)
        trainer.train()
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_in(number, part):
    saves, save, open_file = itertools.count(), torch.save, builtins.open

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save_or_die(content, file, *args, **kwargs):
        if next(saves) != number:
            return save(content, file, *args, **kwargs)
        if part == "last_checkpoint":
            builtins.open = open_or_die
            return save(content, file, *args, **kwargs)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: int(part * len(whole.getvalue()))])
        file.flush()
        die()

    def open_or_die(file, mode="r", *args, **kwargs):
        opened = open_file(file, mode, *args, **kwargs)
        if "last_checkpoint" in str(file) and "w" in mode:
            die()
        return opened

    torch.save = save_or_die


def tensors(value, name=""):
    """Every tensor and number in a checkpoint, by where it is."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in tensors(value[key], f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return tensors(dict(enumerate(value)), name)
    return {name: value}


def final(folder):
    return tensors(torch.load(folder / "model_final.pth", weights_only=True))


def main(root):
    register_dataset(root)
    assert train(root / "whole") == 0
    expected = final(root / "whole")
    assert expected[".iteration"] == 11 and any(".optimizer." in name for name in expected)
    for number, part in itertools.product(SAVES, PARTS):
        folder = root / f"{number}-{part}"
        status = train(folder, (number, part))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (folder, status)
        left = sorted(file.name for file in folder.glob("*.pth"))
        assert train(folder) == 0, f"{folder}: does not resume"
        got = final(folder)
        assert got.keys() == expected.keys(), folder
        different = [name for name in expected if not np.array_equal(expected[name], got[name])]
        assert not different, f"{folder}: {different}"
        assert (folder / "last_checkpoint").read_text() == "model_final.pth", folder
        assert not list(folder.glob("*.partial")), f"{folder}: {list(folder.iterdir())}"
        print(f"killed in save {number} at {part}, with {left}: the same weights")
    print(f"{len(SAVES) * len(PARTS)} kills, {len(expected)} values equal bit for bit")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
