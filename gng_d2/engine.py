"""Detectron2's training job for every dataset of its evaluators, on one GPU, many, or CPUs."""

import inspect
import os
import weakref
from typing import Callable, List, Sequence

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
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from .analysis import build_on_meta
from .checkpoint import Checkpointer, check_norms
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
from .imports import import_modules
from .layers import fold_weight_standardization
from .layers.recompute import recompute_norms

__all__ = ["Trainer", "evaluators_of", "train_or_evaluate", "setup_job", "run_job"]


def _read_labels(path, dtype):
    # Detectron2's own reader asks for copy=False, which numpy 2 refuses.
    with PathManager.open(path, "rb") as file:
        return np.asarray(Image.open(file), dtype=dtype)


def _semantic(dataset_name, output_folder):
    # Detectron2 0.6 does not take it
    takes_reader = "sem_seg_loading_fn" in inspect.signature(SemSegEvaluator).parameters
    reader = {"sem_seg_loading_fn": _read_labels} if takes_reader else {}
    return SemSegEvaluator(dataset_name, output_dir=output_folder, **reader)


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


def evaluators_of(dataset_name: str) -> List[Callable]:
    """What makes the evaluators of a dataset, from its name and an output folder."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise InputError(f"DATASETS.TEST: {dataset_name!r} has evaluator_type {kind!r}; known: {', '.join(EVALUATORS)}")
    return EVALUATORS[kind]


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
            loader = self.build_train_loader(self.cfg, self.start_iter)
            if hasattr(self._trainer, "reset_data_loader"):
                self._trainer.reset_data_loader(lambda: loader)
            else:  # Detectron2 0.6
                self._trainer.data_loader, self._trainer._data_loader_iter = loader, iter(loader)

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
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return DatasetEvaluators([make(dataset_name, output_folder) for make in evaluators_of(dataset_name)])

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluate; with TEST.AUG.ENABLED once more with test-time augmentation, under names that end in _TTA."""
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.AUG.ENABLED and evaluators is None:
            folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
            augmented = super().test(
                cfg,
                GeneralizedRCNNWithTTA(cfg, getattr(model, "module", model)),
                [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST],
            )
            results.update({f"{name}_TTA": metrics for name, metrics in augmented.items()})
        return results


def train_or_evaluate(cfg: CfgNode, args) -> None:
    """What each process of a job does."""
    import_modules(getattr(args, "imports", ()))  # a launched process starts without them
    default_setup(cfg, args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        if getattr(args, "recompute_norms", False):
            recompute_norms(trainer.model)
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


def setup_job(
    config_file: str,
    overrides: Sequence[str] = (),
    *,
    world_size: int = 1,
    resume: bool = False,
    eval_only: bool = False,
) -> CfgNode:
    """The config of a job, after checking all that can be checked before it starts.

    Raises:
        InputError: something that the user gave cannot be used.
    """
    cfg = load_config(config_file, overrides)
    check_config(cfg, world_size)
    _check_checkpoint(cfg, resume, eval_only)
    check_output_dir(cfg)
    check_datasets(cfg, eval_only)
    for name in cfg.DATASETS.TEST:
        evaluators_of(name)
    cfg.freeze()
    return cfg


def _check_checkpoint(cfg, resume, eval_only):
    """The file that the job will load can be read, and was trained with the norms of the config."""
    checkpointer = Checkpointer(nn.Module(), cfg.OUTPUT_DIR)
    resume = resume and checkpointer.has_checkpoint()
    if not resume:
        check_weights(cfg)
    path = checkpointer.get_checkpoint_file() if resume else cfg.MODEL.WEIGHTS
    if resume and not os.path.isfile(path):
        raise InputError(
            f"--resume: {cfg.OUTPUT_DIR}/last_checkpoint names {path}, which is not there. Write the name of a "
            f"checkpoint of that folder into it"
        )
    if not path or "://" in path:
        return
    recorded = checkpointer.read(path).get("norms")
    if recorded is not None and (resume or eval_only):
        check_norms(build_on_meta(cfg), recorded)


def run_job(args) -> None:
    """Run what Detectron2's command line arguments say, and ``--import`` where there is one, in as many processes.

    Raises:
        InputError: as :func:`setup_job`, or in one of the processes.
    """
    import_modules(getattr(args, "imports", ()))
    args.config_file = find_config_file(args.config_file)  # default_setup reads it again
    cfg = setup_job(
        args.config_file,
        args.opts,
        world_size=args.num_gpus * args.num_machines,
        resume=args.resume,
        eval_only=args.eval_only,
    )
    try:
        launch(
            train_or_evaluate,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args),
        )
    except ProcessRaisedException as error:
        _, found, message = str(error).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")
        if not found:
            raise
        raise InputError(message.strip()) from None
