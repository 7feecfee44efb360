"""Training jobs on the embedded data: a process, two processes, resuming, evaluating."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick_models
import ready_process
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from needs import RECOMPUTE

from gng_d2.errors import InputError
from gng_d2.job import engine
from gng_d2.job.build import build_on_meta
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_config
from gng_d2.job.engine import Trainer, setup_job, train_or_evaluate
from gng_d2.models.fuse_norms import fuse_norms
from gng_d2.models.norm_table import norm_summary
from gng_d2.models.recompute_norms import recomputed_modules
from gng_d2.ops import group_norm_cpu
from study.metrics import last_record

CONFIG = "configs/quick/pfpn_pgn.yaml"
SMALL = [
    *quick_models.TRAINING,
    "SOLVER.WARMUP_ITERS",
    "0",
    "SOLVER.LR_SCHEDULER_NAME",
    "WarmupMultiStepLR",
    "SOLVER.STEPS",
    "()",
]


def loss_of_image(model, sample, index):
    """The loss of one image, its proposals sampled by its own seed."""
    torch.manual_seed(100 + index)
    with EventStorage():
        return sum(model([sample]).values())


def two_images():
    cfg = load_config(CONFIG, SMALL)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[])
    samples = [mapper(record) for record in DatasetCatalog.get("gng_shapes_val_separated")[:2]]
    return cfg, samples


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_image_each(path):
    """What each of two processes does."""
    torch.set_num_threads(1)  # in the one process too: sums in another order could sample other proposals
    rank = comm.get_rank()
    cfg, samples = two_images()
    torch.manual_seed(0)
    ddp = Trainer(cfg).model
    loss_of_image(ddp, samples[rank], rank).backward()
    if rank == 0:
        torch.save(gradients(ddp.module), path)
    fuse_norms(ddp).zero_grad()
    loss_of_image(ddp, samples[rank], rank).backward()
    if rank == 0:
        torch.save(gradients(ddp.module), path + ".fused")


@pytest.mark.slow
def test_two_processes_give_the_average_of_two_gradients(shapes, tmp_path):
    path = str(tmp_path / "gradients.pth")
    ready_process.launch(one_image_each, path)
    single, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    cfg, samples = two_images()
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for index, sample in enumerate(samples):
        model.zero_grad()
        loss_of_image(model, sample, index).backward()
        single.append(gradients(model))
    torch.set_num_threads(threads)
    averaged, fused = torch.load(path), torch.load(path + ".fused")
    assert fused.keys() == averaged.keys()
    assert averaged.keys() == single[0].keys() | single[1].keys()
    for name, gradient in averaged.items():
        zero = torch.zeros_like(gradient)
        expected = (single[0].get(name, zero) + single[1].get(name, zero)) / 2
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
        scale = float(gradient.abs().max())
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m: f"{name}: {m}")
    # the two images do differ, so that an average is told from either one
    name = "sem_seg_head.p2.0.norm.weight"
    assert not torch.allclose(single[0][name], single[1][name], rtol=0.1)


def train_net(*args, check=True, **how):
    done = ready_process.run("tools/train_net.py", args, **how)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_train_resume_and_evaluate(shapes, tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path), *SMALL]
    train = [*opts, "DATASETS.TEST", "()"]
    train_net("--config-file", CONFIG, *train, "SOLVER.MAX_ITER", "2")
    first = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert first["iteration"] == 1
    model = build_on_meta(load_config(CONFIG, SMALL))
    assert norm_summary(model) in (tmp_path / "log.txt").read_text()

    train_net("--config-file", CONFIG, "--resume", *train, "SOLVER.MAX_ITER", "3")
    second = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert second["iteration"] == 2
    name = "backbone.bottom_up.stem.conv1.weight"
    assert not torch.equal(first["model"][name], second["model"][name])

    done = train_net("--config-file", CONFIG, "--eval-only", *opts, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    for metric in ("PQ", "mIoU", "AP50"):
        assert metric in done.stdout
    assert (tmp_path / "inference" / "predictions.json").exists()
    del first["model"][name]
    torch.save(first, tmp_path / "half.pth")
    words = ["--eval-only", *opts, "MODEL.WEIGHTS", str(tmp_path / "half.pth")]
    done = train_net("--config-file", CONFIG, *words, check=False)
    assert done.returncode == 1 and f"half.pth lacks 1 of the model's {len(first['model']) + 1} weights" in done.stderr


@pytest.mark.slow
def test_resuming_repeats_the_uninterrupted_run(shapes, tmp_path):
    """Killed after iteration 3 of 5, resumed from the checkpoint after iteration 2: the same weights. The number of
    processes that load data changes nothing."""
    opts = [
        *SMALL,
        "SOLVER.MAX_ITER",
        "5",
        "SOLVER.CHECKPOINT_PERIOD",
        "2",
        "TEST.EVAL_PERIOD",
        "0",
        "DATASETS.TEST",
        "()",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_net("--config-file", CONFIG, "OUTPUT_DIR", str(whole), *opts, "DATALOADER.NUM_WORKERS", "0")
    opts += ["DATALOADER.NUM_WORKERS", "2"]
    killed = tmp_path / "killed.py"
    killed.write_text(KILL_AT_3)
    done = ready_process.run(killed, ["--config-file", CONFIG, "OUTPUT_DIR", str(cut), *opts])
    assert done.returncode == -9, done.stderr[-2000:]
    assert (cut / "last_checkpoint").read_text() == "model_0000001.pth" and not (cut / "model_final.pth").exists()
    train_net("--config-file", CONFIG, "--resume", "OUTPUT_DIR", str(cut), *opts)
    files = (whole / "model_final.pth", cut / "model_final.pth", cut / "model_0000001.pth")
    expected, got, early = (torch.load(file, weights_only=False)["model"] for file in files)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not torch.equal(early["sem_seg_head.p2.0.norm.weight"], got["sem_seg_head.p2.0.norm.weight"])


KILL_AT_3 = """
import os, signal, sys
from detectron2.engine import default_argument_parser
from gng_d2.job.engine import Trainer, run_job
step = Trainer.run_step
def run_step(self):
    step(self)
    if self.iter == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.run_step = run_step
run_job(default_argument_parser().parse_args())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, message",
    [
        (["--config-file", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--config-file", CONFIG, "MODEL.WEIGHTS", "nothing.pth"], "MODEL.WEIGHTS: the file nothing.pth"),
        (["--config-file", CONFIG, "MODEL.FPN.NORM", "PNG"], "MODEL.FPN.NORM: unknown norm 'PNG'"),
        (["--config-file", CONFIG, "MODEL.ROI_HEADS.NUM_CLASSES", "4"], "MODEL.ROI_HEADS.NUM_CLASSES is 4, but"),
        (["--config-file", CONFIG, "MODEL.WEIGHTS", CONFIG], f"MODEL.WEIGHTS: {CONFIG} cannot be read as weights"),
    ],
)
def test_bad_input_is_one_line(args, message, shapes, tmp_path):
    done = train_net(*args, *(["OUTPUT_DIR", str(tmp_path)] if len(args) == 4 else []), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_weight_standardized_detector_trains_and_evaluates(shapes, tmp_path):
    """And a checkpoint of PGN+WS evaluated with a GN config stops, naming the layers."""
    opts = [*SMALL[:4], "MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "SOLVER.IMS_PER_BATCH", "2"]
    train_net(
        "--config-file",
        "configs/quick/faster_rcnn_pgn_ws.yaml",
        "OUTPUT_DIR",
        str(tmp_path),
        *opts,
        "SOLVER.MAX_ITER",
        "2",
        "DATASETS.TEST",
        "()",
    )
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "eval")]
    same = train_net(
        "--config-file",
        "configs/quick/faster_rcnn_pgn_ws.yaml",
        "--eval-only",
        *weights,
        *opts,
        "TEST.AUG.ENABLED",
        "True",
        "TEST.AUG.MIN_SIZES",
        "(96,)",
        "TEST.AUG.FLIP",
        "False",
    )
    assert "AP50" in same.stdout
    for folder in ("inference", "inference_TTA"):
        assert (tmp_path / "eval" / folder / "coco_instances_results.json").exists()
    message = (
        r"trained with other norms(.*\n)+.*stem.conv1.norm: 1 group and WS in the checkpoint, 32 groups and WS here"
    )
    with pytest.raises(InputError, match=message):
        setup_job("configs/quick/faster_rcnn_gn_ws.yaml", [*weights, *opts], eval_only=True)


@pytest.mark.slow
def test_an_error_in_one_of_two_processes_is_one_message_too(shapes, tmp_path):
    """A 32-pixel image leaves 1x1 maps, where PGN's 64 groups of 512 -> 64 would hold a single number."""
    opts = ["SOLVER.IMS_PER_BATCH", "2", "MODEL.FPN.NORM", "PGN", "INPUT.MIN_SIZE_TRAIN", "(32,)"]
    words = ["--dist-url", "auto", "--num-gpus", "2", "--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path), *opts]
    done = train_net(*words, "SOLVER.MAX_ITER", "1", check=False, forks=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "single number" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_broken_image_is_one_line_from_a_data_process_too(shapes, tmp_path):
    module = tmp_path / "one_broken_image.py"
    module.write_text(ONE_BROKEN_IMAGE)
    (tmp_path / "broken.jpg").write_text("Not found")
    opts = ["OUTPUT_DIR", str(tmp_path / "out"), *SMALL, "DATASETS.TRAIN", "('broken',)", "DATALOADER.NUM_WORKERS", "1"]
    done = train_net("--config-file", CONFIG, "--import", str(module), "--num-gpus", "1", *opts, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"error: the image {tmp_path}/broken.jpg cannot be read")


ONE_BROKEN_IMAGE = """
import os
from detectron2.data import DatasetCatalog, MetadataCatalog
records = DatasetCatalog.get("gng_shapes_val_separated")[:1]
records[0]["file_name"] = os.path.join(os.path.dirname(__file__), "broken.jpg")
DatasetCatalog.register("broken", lambda: records)
MetadataCatalog.get("broken").set(**{
    field: MetadataCatalog.get("gng_shapes_val_separated").get(field) for field in ("thing_classes", "stuff_classes")
})
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The job of kill_in_checkpoints.py: 12 steps, a checkpoint after each second one."""
    path = Path(__file__).with_name("kill_in_checkpoints.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register_dataset(tmp_path_factory.mktemp("images"))
    yield module
    META_ARCH_REGISTRY._obj_map.pop("Tiny")
    DatasetCatalog.remove("tiny")
    MetadataCatalog.remove("tiny")


def run(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def iteration(path):
    return torch.load(path, weights_only=True)["iteration"]


@pytest.mark.parametrize("final", ["whole", "missing", "of an earlier MAX_ITER", "half-written", "not named"])
def test_a_run_with_no_step_left_has_its_final_checkpoint(final, tiny, tmp_path):
    cfg = tiny.config(tmp_path)
    if final == "of an earlier MAX_ITER":
        cfg.SOLVER.MAX_ITER = 6
        run(cfg)
        cfg.SOLVER.MAX_ITER = 12
        earlier = (tmp_path / "model_final.pth").read_bytes()
    run(cfg, resume=True)
    path, last = tmp_path / "model_final.pth", tmp_path / "last_checkpoint"
    content, named = path.read_bytes(), last.read_text()
    assert iteration(path) == 11 and named == "model_final.pth"
    if final != "whole":
        last.write_text("model_0000011.pth")
    if final == "missing":
        path.unlink()
    elif final == "half-written":
        path.write_bytes(content[: len(content) // 2])
    elif final == "of an earlier MAX_ITER":
        path.write_bytes(earlier)
    run(cfg, resume=True)
    assert iteration(path) == 11 and last.read_text() == "model_final.pth"
    assert Trainer(cfg).checkpointer.read(str(path))["model"].keys()


# in a process of its own: a fork of one whose autograd has threads cannot train
KILL_IN_WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/job")
import kill_in_checkpoints as tiny
from gng_d2.job.engine import Trainer, then_leave_group
tiny.register_dataset(Path(sys.argv[1]))
cfg = tiny.config(sys.argv[2])
cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 4, 1000
tiny.kill_in(0, 0.5)
trainer = Trainer(cfg)
trainer.resume_or_load(resume=True)
trainer.train()
"""


@pytest.mark.slow
def test_a_higher_max_iter_does_not_put_the_only_checkpoint_at_risk(tiny, tmp_path):
    """Killed in the write of the new one, the old one is still whole."""
    cfg = tiny.config(tmp_path)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 3, 1000
    run(cfg)
    before = (tmp_path / "model_final.pth").read_bytes()
    images = tmp_path / "images"
    images.mkdir()
    script = tmp_path / "kill.py"
    script.write_text(KILL_IN_WRITE)
    done = ready_process.run(script, [str(images), str(tmp_path)])
    assert done.returncode == -9
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_a_resume_builds_the_dataset_once(tiny, tmp_path, monkeypatch):
    cfg = tiny.config(tmp_path)
    cfg.SOLVER.MAX_ITER = 2
    run(cfg)
    cfg.SOLVER.MAX_ITER = 4
    loaded, get = [], DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: loaded.append(name) or get(name))
    assert run(cfg, resume=True).start_iter == 2
    assert loaded == ["tiny"]


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """Runs tools/train_net.py on the tiny model, and returns the weights."""

    def run(name, *flags, steps=12):
        cfg = tiny.config(tmp_path / name)
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = steps, 0
        path = tmp_path / f"{name}.yaml"
        path.write_text(cfg.dump())
        words = ["tools/train_net.py", "--config-file", str(path), *flags]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
        return torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]

    return run


@RECOMPUTE
def test_recomputed_norms_train_and_resume_to_the_same_bits(train, monkeypatch):
    recomputed, recompute = [], engine.recompute_norms
    monkeypatch.setattr(engine, "recompute_norms", lambda model: recomputed.append(recompute(model)))
    kept, whole = train("kept"), train("whole", "--recompute-norms")
    early = train("cut", "--recompute-norms", steps=7)
    cut = train("cut", "--recompute-norms", "--resume")
    assert len(recomputed) == 3 and all(map(recomputed_modules, recomputed))
    assert any(not torch.equal(tensor, kept[name]) for name, tensor in early.items())
    for name, tensor in kept.items():
        assert torch.equal(tensor, whole[name]) and torch.equal(tensor, cut[name]), name


def test_fused_norms_train_and_resume_as_those_that_are_not(train, monkeypatch):
    """With our kernels, which the few pixels of this job would not get."""
    fused = []

    def is_faster(x, num_groups, weight, bias, is_fused):
        fused.append(is_fused)
        return x.is_contiguous()

    monkeypatch.setattr(group_norm_cpu, "is_faster", is_faster)
    separate = train("separate")
    assert not any(fused)
    fused.clear()
    whole = train("whole", "--fuse-norms")
    assert len(fused) == 12 and all(fused)
    train("cut", "--fuse-norms", steps=7)
    cut = train("cut", "--fuse-norms", "--resume")
    assert list(whole) == list(separate)
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name])
        torch.testing.assert_close(tensor, separate[name], rtol=1e-4, atol=1e-6)


def test_test_time_augmentation_is_once_at_the_end(shapes, tmp_path, monkeypatch):
    """As in Detectron2's train_net.py: it takes many times as long as an evaluation."""
    evaluated = []

    def test(cls, cfg, model, evaluators=None):
        evaluated.append(type(model).__name__)
        return {"bbox": {"AP": float(len(evaluated))}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    tiny_rcnn = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "8"]
    opts = [*tiny_rcnn, "OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "3"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", "1000", "TEST.EVAL_PERIOD", "1", "TEST.AUG.ENABLED", "True"]
    trainer = Trainer(load_config("configs/quick/faster_rcnn_gn_ws.yaml", opts))
    assert trainer.train() == {"bbox": {"AP": 3.0}, "bbox_TTA": {"AP": 4.0}}
    assert evaluated == ["GeneralizedRCNN"] * 3 + ["GeneralizedRCNNWithTTA"]
    with open(tmp_path / "metrics.json") as file:
        metrics = [json.loads(line) for line in file]
    assert metrics[-1]["bbox_TTA/AP"] == 4.0 and metrics[-2]["bbox/AP"] == 3.0


def test_what_was_evaluated_is_written_before_test_time_augmentation_begins(shapes, tmp_path, monkeypatch):
    opts = ["OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "1"]
    opts += ["TEST.AUG.ENABLED", "True"]
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: {"bbox": {"AP": 3.0}}))

    def killed(cls, cfg, model):
        assert last_record(tmp_path / "metrics.json") == {"iteration": 1, "bbox/AP": 3.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "test_with_TTA", classmethod(killed))
    with pytest.raises(KeyboardInterrupt):
        Trainer(load_config("configs/quick/faster_rcnn_gn_ws.yaml", opts)).train()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("TEST.AUG.ENABLED True", "^TEST.AUG.ENABLED: Detectron2's test-time augmentation does not take this Panoptic"),
        (
            "MODEL.FPN.OUT_CHANNELS -5",
            "^num_channels must be .*, not -5. MODEL.FPN.OUT_CHANNELS is -5; with its default, 256, the model can be ",
        ),
        ("MODEL.RESNETS.DEPTH 51", "MODEL.RESNETS.DEPTH is 51; with its default, 50, "),
        (
            "MODEL.ROI_HEADS.NAME Elsewhere",
            "^the model of this config cannot be built: No object named 'Elsewhere' found in 'ROI_HEADS' registry! "
            "Your own is registered by a module of yours: --import FILE.py runs it first",
        ),
        ("OUTPUT_DIR {tmp_path}/file", "cannot write to OUTPUT_DIR .*file"),
    ],
)
def test_what_no_job_could_end_with_is_refused_before_it(overrides, message, shapes, tmp_path):
    (tmp_path / "file").write_text("mine")
    words = ["OUTPUT_DIR", str(tmp_path), *overrides.format(tmp_path=tmp_path).split()]
    with pytest.raises(InputError, match=message):
        setup_job(CONFIG, words)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_calibration_without_batch_norms_is_refused(shapes, tmp_path):
    torch.save({"model": build_model(load_config(CONFIG, [])).state_dict()}, tmp_path / "gn.pth")
    for weights in (tmp_path / "gn.pth", ""):
        words = ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.RESNETS.NORM", "GN1", "MODEL.WEIGHTS", str(weights)]
        with pytest.raises(InputError, match=f"^--calibrate-norms fits .* and MODEL.WEIGHTS '{weights}' holds none"):
            setup_job(CONFIG, words, calibrate_norms=3)


def test_norm_keys_are_checked_before_a_job(shapes, tmp_path, monkeypatch):
    def refuse(cfg, model):
        raise InputError(f"{cfg.OUTPUT_DIR} {type(model).__name__}")

    monkeypatch.setattr(engine, "check_norm_keys", refuse)
    with pytest.raises(InputError, match=f"{tmp_path} PanopticFPN"):
        setup_job(CONFIG, ["OUTPUT_DIR", str(tmp_path)])


def test_weights_that_have_to_be_fetched_are_not_looked_at_before_a_job(shapes, tmp_path):
    weights = "catalog://ImageNetPretrained/FAIR/R-50-GN"
    for flags in ({}, {"eval_only": True}, {"calibrate_norms": 3}):
        assert (
            weights == setup_job(CONFIG, ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", weights], **flags).MODEL.WEIGHTS
        )


@pytest.fixture
def evaluated(monkeypatch):
    """The weights that evaluations of this process have loaded. Their result is always the same."""
    paths = []
    monkeypatch.setattr(engine, "load_model", lambda model, path: paths.append(path))
    monkeypatch.setattr(Trainer, "test", lambda cfg, model: {"bbox": {"AP": 30.0}})
    return paths


def job(tmp_path, *overrides, **flags):
    args = SimpleNamespace(**{"eval_only": True, "resume": False, "config_file": CONFIG, **flags})
    train_or_evaluate(
        load_config(CONFIG, ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "given.pth", *overrides]), args
    )


def test_an_evaluation_takes_the_checkpoint_of_the_run_if_it_is_resumed(evaluated, shapes, tmp_path):
    Checkpointer(build_model(load_config(CONFIG, [])), str(tmp_path)).save("model_final", iteration=3)
    job(tmp_path)
    job(tmp_path, resume=True)
    assert evaluated == ["given.pth", str(tmp_path / "model_final.pth")]


def test_expected_results_are_compared(evaluated, shapes, tmp_path):
    job(tmp_path, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 30.5, 1.0]]")
    with pytest.raises(SystemExit):
        job(tmp_path, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 40.0, 1.0]]")


@pytest.mark.parametrize("flag", ["recompute_norms", "fuse_norms"])
@pytest.mark.parametrize("eval_only", [False, True])
def test_flags_change_the_model_that_is_run(eval_only, flag, evaluated, shapes, tmp_path, monkeypatch):
    changed = []
    monkeypatch.setattr(engine, flag, changed.append)
    monkeypatch.setattr(Trainer, "resume_or_load", lambda self, resume: None)
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    job(tmp_path, eval_only=eval_only, **{flag: True})
    job(tmp_path, eval_only=eval_only)
    assert len(changed) == (0 if eval_only and flag == "recompute_norms" else 1)


def test_an_evaluation_without_weights_is_refused(shapes, tmp_path):
    with pytest.raises(InputError, match="^MODEL.WEIGHTS '': --eval-only needs"):
        setup_job(CONFIG, ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", ""], eval_only=True)


def test_a_resume_with_another_model_is_refused_before_anything_is_written(shapes, tmp_path):
    Checkpointer(build_model(load_config(CONFIG, [])), str(tmp_path)).save("model_final", iteration=3)
    before = sorted(tmp_path.iterdir())
    words = ["OUTPUT_DIR", str(tmp_path), "MODEL.FPN.OUT_CHANNELS", "32"]
    with pytest.raises(InputError, match="^--resume: .*/model_final.pth is of another model"):
        setup_job(CONFIG, words, resume=True)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(
        InputError, match="other norms .*\n.*fpn_lateral2.norm: 32 groups in the checkpoint, no norm here"
    ):
        setup_job(CONFIG, ["OUTPUT_DIR", str(tmp_path), "MODEL.FPN.NORM", ""], resume=True)


def test_mixed_precision_on_a_cpu_is_refused(tiny, tmp_path):
    cfg = tiny.config(tmp_path)
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cpu"])
    with pytest.raises(InputError, match="^SOLVER.AMP.ENABLED: Detectron2 trains in mixed precision on CUDA alone"):
        Trainer(cfg)


def test_a_resume_that_trains_other_weights_is_named(tiny, tmp_path, monkeypatch):
    cfg, build = tiny.config(tmp_path), Trainer.build_model
    run(cfg)

    def frozen(cls, cfg):
        model = build(cfg)
        model.layers[0].requires_grad_(False)
        return model

    monkeypatch.setattr(Trainer, "build_model", classmethod(frozen))
    with pytest.raises(
        InputError, match=f"^--resume: the optimizer of the checkpoint in {tmp_path} has other groups of weights"
    ):
        run(cfg, resume=True)


@pytest.mark.slow
def test_resuming_from_a_checkpoint_that_is_gone_is_named(shapes, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    done = train_net("--config-file", CONFIG, "--resume", "OUTPUT_DIR", str(tmp_path), check=False)
    assert done.returncode == 1 and "model_0000009.pth: No such file" in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["last_checkpoint"]
