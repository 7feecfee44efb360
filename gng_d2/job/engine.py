"""Train or evaluate a Detectron2 model from a config, as Detectron2's tools/train_net.py does.

What would end a job early is refused before it starts. A job that was killed resumes as if it had run through. It runs
in one process, on many GPUs, or on CPUs.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch
from weakref import proxy

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, create_ddp_model, default_setup, defaults, hooks, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import distributed as dist
from torch.multiprocessing import ProcessRaisedException

from gng_d2.errors import InputError
from gng_d2.layers.binding import build_naming_norms
from gng_d2.models.fuse_norms import fuse_norms
from gng_d2.models.norm_table import norm_summary
from gng_d2.models.recompute_norms import recompute_norms

from .build import bind_remaining_norms, build_on_meta
from .calibrate import calibrate_backbone
from .checkpoint import Checkpointer, batch_norms, check_norms, check_resumed, load_model
from .config import check_config, check_solver, check_weights, find_config_file, load_config
from .data.checks import map_values, naming_datasets, prepare_datasets
from .data.images import NamingMapper
from .data.loader import build_train_loader, seed_step, start_at
from .evaluators import build_evaluator, check_evaluation
from .files import prepare_folder
from .imports import import_modules
from .norm_keys import check_norm_keys


class Trainer(DefaultTrainer):
    """:class:`detectron2.engine.DefaultTrainer` with an evaluator for each dataset, our checkpointer, and DDP on CPUs.

    With a SEED, a run that was interrupted and resumed does what an uninterrupted one does.
    """

    def __init__(self, cfg: CfgNode):
        if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):  # the first step would stop
            raise InputError("SOLVER.AMP.ENABLED: Detectron2 trains in mixed precision on CUDA alone. Set it to False")
        # DDP refuses the device_ids that Detectron2 gives it on the CPU, and finds a model's GPU without them. The
        # loggers are set up by who runs the job
        ddp = partial(create_ddp_model, device_ids=None)
        with patch.multiple(defaults, create_ddp_model=ddp, setup_logger=lambda: None):
            super().__init__(cfg)

    def resume_or_load(self, resume=True):
        try:
            super().resume_or_load(resume)
        except ValueError as error:
            if "parameter group" not in str(error):  # PyTorch's, of an optimizer with others
                raise
            raise InputError(
                f"--resume: the optimizer of the checkpoint in {self.cfg.OUTPUT_DIR} has other groups of weights than "
                f"this config's, for instance by another MODEL.BACKBONE.FREEZE_AT, or by SOLVER.WEIGHT_DECAY_NORM, "
                f"WEIGHT_DECAY_BIAS or BIAS_LR_FACTOR. Use the config that the run began with"
            ) from error
        if self.start_iter > 0 and self.cfg.SEED >= 0:
            start_at(self._trainer.data_loader, self.start_iter)
            if not hasattr(self._trainer, "_data_loader_iter_obj"):  # Detectron2 0.6 has begun already
                self._trainer._data_loader_iter = iter(self._trainer.data_loader)
        if self.start_iter >= self.max_iter:  # the run may have been killed before its model_final was whole
            self.checkpointer.save("model_final", iteration=self.iter)

    def run_step(self):
        if self.cfg.SEED >= 0:
            seed_step(self.cfg, self.iter)
        super().run_step()

    @classmethod
    def build_model(cls, cfg):
        model = bind_remaining_norms(build_naming_norms(super().build_model, cfg))
        logging.getLogger(__name__).info(norm_summary(model))
        return model

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        with naming_datasets("DATASETS.TEST", [dataset_name]):
            mapper = NamingMapper(DatasetMapper(cfg, is_train=False), map_values(cfg))
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    def build_hooks(self):
        """Detectron2's, with our checkpointer. With TEST.AUG.ENABLED an evaluation with test-time augmentation follows
        the last step; as it takes many times as long as an evaluation, all other metrics are written before it."""
        self.checkpointer = Checkpointer(self.model, self.cfg.OUTPUT_DIR, trainer=proxy(self))
        built = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED and self.cfg.DATASETS.TEST:
            writing = [hook for hook in built if isinstance(hook, hooks.PeriodicWriter)]

            def evaluate():
                for hook in writing:
                    for writer in hook._writers:
                        writer.write()
                self.storage.step()  # Detectron2's writers leave out what an iteration that they wrote gets later
                results = self.test_with_TTA(self.cfg, self.model)
                self._last_eval_results.update(results)
                return results

            built.insert(len(built) - len(writing), hooks.EvalHook(0, evaluate))  # before the writers, for its metrics
        return built

    def train(self):
        """Train, evaluate, and return the metrics by task (in the main process)."""
        super().train()
        return getattr(self, "_last_eval_results", None)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return build_evaluator(cfg, dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test_with_TTA(cls, cfg, model):
        """Evaluate with the test-time augmentation of TEST.AUG; the metrics are under names that end in _TTA."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        results = cls.test(
            cfg,
            GeneralizedRCNNWithTTA(cfg, getattr(model, "module", model)),
            [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST],
        )
        return {f"{name}_TTA": metrics for name, metrics in results.items()}


def train_or_evaluate(cfg: CfgNode, args) -> None:
    """What each process of a job does."""
    import_modules(getattr(args, "imports", ()))  # a launched process starts without them
    default_setup(cfg, args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        if getattr(args, "recompute_norms", False):
            recompute_norms(trainer.model)
        if getattr(args, "fuse_norms", False):
            fuse_norms(trainer.model)
        trainer.resume_or_load(resume=args.resume)
        if getattr(args, "calibrate_norms", 0) and trainer.start_iter == 0:
            calibrate_backbone(trainer.model, cfg, args.calibrate_norms)
        trainer.train()
        return
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    resume = args.resume and checkpointer.has_checkpoint()
    load_model(model, checkpointer.find_checkpoint()[0] if resume else cfg.MODEL.WEIGHTS)
    if getattr(args, "fuse_norms", False):
        fuse_norms(model)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)


def setup_job(
    config_file: str,
    overrides: Sequence[str] = (),
    *,
    world_size: int = 1,
    resume: bool = False,
    eval_only: bool = False,
    calibrate_norms: int = 0,
) -> CfgNode:
    """The config of a job, after checking all that can be checked before it starts.

    Raises:
        InputError: something that the user gave cannot be used.
    """
    if eval_only and calibrate_norms:
        raise InputError("--calibrate-norms fits norms before the first step, and --eval-only makes none")
    cfg = load_config(config_file, overrides)
    check_config(cfg, world_size)
    if not eval_only:
        check_solver(cfg)
    model = build_on_meta(cfg)
    check_norm_keys(cfg, model)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        path, checkpoint = checkpointer.find_checkpoint()
        if not eval_only:
            check_resumed(model, checkpoint, path)
        check_norms(model, checkpoint, path)
    else:
        check_weights(cfg)
        _check_content(cfg.MODEL.WEIGHTS, checkpointer, eval_only, calibrate_norms)
    prepare_folder(cfg.OUTPUT_DIR, f"to OUTPUT_DIR {cfg.OUTPUT_DIR!r}")
    prepare_datasets(cfg, eval_only)
    check_evaluation(cfg, model)
    cfg.freeze()
    return cfg


def _check_content(path, checkpointer, eval_only, calibrate_norms):
    """See that the file MODEL.WEIGHTS holds what the job needs. One that has to be fetched is not looked at."""
    if eval_only and not path:
        raise InputError("MODEL.WEIGHTS '': --eval-only needs the file of weights that is to be evaluated")
    if "://" in path:
        return
    try:
        checkpoint = checkpointer.read(path) if path else {"model": {}}
    except InputError as error:
        raise InputError(f"MODEL.WEIGHTS: {error}") from None
    if eval_only:
        check_norms(checkpointer.model, checkpoint, path)
    elif calibrate_norms and not batch_norms(checkpoint):
        raise InputError(f"--calibrate-norms fits group norms to batch norms, and MODEL.WEIGHTS {path!r} holds none")


def then_leave_group(main: Callable, *args):
    """What each process of a job does: ``main(*args)``, and then it ends the threads of its process group. With them
    a process is now and then aborted when it ends, and its job would count as failed."""
    result = main(*args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def run_job(args) -> None:
    """Run the job that Detectron2's command line arguments describe, in as many processes as they say.

    Args:
        args: of Detectron2's ``default_argument_parser``; our tools' ``imports``, ``recompute_norms``, ``fuse_norms``
            and ``calibrate_norms`` may be missing.

    Raises:
        InputError: as :func:`setup_job`, or in one of the processes.
    """
    import_modules(getattr(args, "imports", ()))
    args.config_file = find_config_file(args.config_file)  # default_setup reads it again
    log = setup_logger()  # to the terminal, as the job's own log begins with the job
    cfg = setup_job(
        args.config_file,
        args.opts,
        world_size=args.num_gpus * args.num_machines,
        resume=args.resume,
        eval_only=args.eval_only,
        calibrate_norms=getattr(args, "calibrate_norms", 0),
    )
    log.handlers.clear()
    try:
        launch(
            then_leave_group,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(train_or_evaluate, cfg, args),
        )
    except (ProcessRaisedException, InputError) as error:
        # the message of a process of the job, or of its data loader, stands at the end of a traceback
        _, found, message = str(error).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")
        if not found:
            raise
        raise InputError(message.strip()) from None
