"""Detectron2's training job for every dataset of its evaluators, on one GPU, many, or CPUs."""

import logging
import os
import weakref

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

from .checkpoint import Checkpointer
from .config import check_config, check_datasets, check_output_dir, check_weights, load_config
from .errors import InputError

__all__ = ["Trainer", "build_evaluator", "train_or_evaluate", "run_job"]

# what each `evaluator_type` of Detectron2's metadata is evaluated with
EVALUATORS = {
    "coco": [COCOEvaluator],
    "coco_panoptic_seg": [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator],
    "sem_seg": [SemSegEvaluator],
    "lvis": [LVISEvaluator],
    "pascal_voc": [PascalVOCDetectionEvaluator],
    "cityscapes_instance": [CityscapesInstanceEvaluator],
    "cityscapes_sem_seg": [CityscapesSemSegEvaluator],
}
WITHOUT_OUTPUT = (PascalVOCDetectionEvaluator, CityscapesInstanceEvaluator, CityscapesSemSegEvaluator)


def build_evaluator(dataset_name: str, output_folder: str) -> DatasetEvaluators:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise InputError(f"DATASETS.TEST: {dataset_name!r} has evaluator_type {kind!r}; known: {', '.join(EVALUATORS)}")
    return DatasetEvaluators(
        cls(dataset_name) if cls in WITHOUT_OUTPUT else cls(dataset_name, output_dir=output_folder)
        for cls in EVALUATORS[kind]
    )


class Trainer(DefaultTrainer):
    """:class:`detectron2.engine.DefaultTrainer` with evaluators by dataset, our checkpointer, and DDP on CPUs."""

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

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return build_evaluator(dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))


def train_or_evaluate(cfg: CfgNode, args) -> dict:
    """What each process of a job does. Returns the metrics by task, in the main process."""
    default_setup(cfg, args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run_job(args) -> dict:
    """Run what Detectron2's command line arguments say, in as many processes, after checking what can be.

    Raises:
        InputError: something that the user gave cannot be used.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg, args.num_gpus * args.num_machines)
    check_output_dir(cfg)
    if not (args.resume and Checkpointer(None, cfg.OUTPUT_DIR).has_checkpoint()):
        check_weights(cfg)
    check_datasets(cfg, args.eval_only)
    cfg.freeze()
    return launch(
        train_or_evaluate,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args),
    )
