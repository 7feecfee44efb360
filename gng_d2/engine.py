"""Detectron2's training job for every dataset of its evaluators, on one GPU, many, or CPUs."""

import os
import weakref

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    launch,
)
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    verify_results,
)
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import nn

from .checkpoint import Checkpointer
from .config import (
    check_config,
    check_datasets,
    check_output_dir,
    check_weights,
    find_config_file,
    load_config,
)
from .data.loader import build_train_loader, seed_step
from .errors import InputError
from .layers import fold_weight_standardization

__all__ = ["Trainer", "build_evaluator", "train_or_evaluate", "setup_job", "run_job"]


def _read_labels(path, dtype):
    # Detectron2's own reader asks for copy=False, which numpy 2 refuses.
    with PathManager.open(path, "rb") as file:
        return np.asarray(Image.open(file), dtype=dtype)


def _semantic(dataset_name, output_folder):
    return SemSegEvaluator(dataset_name, output_dir=output_folder, sem_seg_loading_fn=_read_labels)


def _coco(dataset_name, output_folder):
    return COCOEvaluator(dataset_name, output_dir=output_folder)


# what each `evaluator_type` of Detectron2's metadata is evaluated with
EVALUATORS = {
    "coco": [_coco],
    "coco_panoptic_seg": [_semantic, _coco, COCOPanopticEvaluator],
    "sem_seg": [_semantic],
    "lvis": [lambda name, folder: LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": [lambda name, folder: PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": [lambda name, folder: CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": [lambda name, folder: CityscapesSemSegEvaluator(name)],
}


def build_evaluator(dataset_name: str, output_folder: str) -> DatasetEvaluators:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise InputError(f"DATASETS.TEST: {dataset_name!r} has evaluator_type {kind!r}; known: {', '.join(EVALUATORS)}")
    return DatasetEvaluators([make(dataset_name, output_folder) for make in EVALUATORS[kind]])


class Trainer(DefaultTrainer):
    """:class:`detectron2.engine.DefaultTrainer` with evaluators by dataset, our checkpointer, and DDP on CPUs.

    With a SEED, a run that was interrupted and resumed does what an uninterrupted one does.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        # DDP refuses device_ids on the CPU, and on GPUs takes the model's device without them.
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume=True):
        super().resume_or_load(resume)
        if self.start_iter > 0 and self.cfg.SEED >= 0:
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, self.start_iter))

    def run_step(self):
        if self.cfg.SEED >= 0:
            seed_step(self.cfg, self.iter)
        super().run_step()

    @classmethod
    def build_train_loader(cls, cfg, start_iter=0):
        return build_train_loader(cfg, start_iter)

    def train(self):
        """Train, evaluate, and return the metrics by task (in the main process)."""
        super().train()
        return getattr(self, "_last_eval_results", None)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return build_evaluator(dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))


def train_or_evaluate(cfg: CfgNode, args) -> None:
    """What each process of a job does."""
    default_setup(cfg, args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    resume = args.resume and checkpointer.has_checkpoint()
    checkpointer.load(checkpointer.get_checkpoint_file() if resume else cfg.MODEL.WEIGHTS)
    fold_weight_standardization(model)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)


def setup_job(args) -> CfgNode:
    """The config that Detectron2's command line arguments name, after checking all that can be.

    Raises:
        InputError: something that the user gave cannot be used. Nothing was written.
    """
    args.config_file = find_config_file(args.config_file)  # default_setup reads it again
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg, args.num_gpus * args.num_machines)
    check_output_dir(cfg)
    if not (args.resume and Checkpointer(nn.Module(), cfg.OUTPUT_DIR).has_checkpoint()):
        check_weights(cfg)
    check_datasets(cfg, args.eval_only)
    cfg.freeze()
    return cfg


def run_job(args) -> None:
    """Run what Detectron2's command line arguments say, in as many processes.

    Raises:
        InputError: as :func:`setup_job`.
    """
    cfg = setup_job(args)
    launch(
        train_or_evaluate,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args),
    )
