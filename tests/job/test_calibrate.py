"""A job whose backbone has group norms starts from batch-norm weights."""

import copy
import logging
import pickle
import random
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import quick_models
import ready_process
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from gng_d2 import calibrate_norms
from gng_d2.errors import InputError
from gng_d2.job import engine
from gng_d2.job.calibrate import calibrate_backbone
from gng_d2.job.config import load_config
from gng_d2.job.engine import Trainer, setup_job
from gng_d2.layers import GroupNorm
from gng_d2.models.fuse_norms import fuse_norms
from gng_d2.models.recompute_norms import recompute_norms
from study.comparison import Comparison

CONFIG = "configs/quick/pfpn_pgn.yaml"
RATE_NEAR_0 = [*quick_models.TRAINING, "SOLVER.BASE_LR", "1e-9", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "1"]
RATE_NEAR_0 += ["DATASETS.TEST", "()", "SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.WEIGHT_DECAY_NORM", "0.0"]


def randomize(model):
    """Batch norms with statistics and affines of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1), nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3), nn.init.normal_(module.bias)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory, shapes):
    """A checkpoint of the quick model with batch norm in its backbone."""
    torch.manual_seed(0)
    model = randomize(build_model(config(None, "MODEL.RESNETS.NORM", "BN")))
    path = tmp_path_factory.mktemp("weights") / "bn.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def config(weights, *overrides, output="."):
    return load_config(
        CONFIG, [*RATE_NEAR_0, "MODEL.WEIGHTS", str(weights or ""), "OUTPUT_DIR", str(output), *overrides]
    )


def trainer(weights, *overrides, output=".", resume=False):
    made = Trainer(config(weights, *overrides, output=output))
    made.resume_or_load(resume=resume)
    return made


def first_images(number, records=None):
    records = records or sorted(DatasetCatalog.get("gng_shapes_train_separated"), key=lambda r: int(r["image_id"]))
    mapper = DatasetMapper(config(None), is_train=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config(None).MODEL.PIXEL_MEAN, config(None).MODEL.PIXEL_STD))
    return [((mapper(record)["image"] - mean) / std)[None] for record in records[:number]]


def saved(path):
    return torch.load(path, weights_only=True)["model"]


def with_batch_norm(weights):
    """The backbone that the checkpoint is of."""
    model = build_model(config(weights, "MODEL.RESNETS.NORM", "BN")).eval()
    model.load_state_dict(saved(weights))
    return model.backbone.bottom_up


def group_norms(model):
    return {name: m for name, m in model.backbone.bottom_up.named_modules() if isinstance(m, nn.GroupNorm)}


def test_the_backbone_is_calibrated_on_the_first_images(weights, tmp_path, caplog):
    freeze = ["MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.RESNETS.NORM", "GN1"]
    made = trainer(weights, *freeze, output=tmp_path)
    before, state = copy.deepcopy(made.model), torch.get_rng_state()
    parameters = [(p, p.requires_grad) for p in made.model.parameters()]
    with caplog.at_level(logging.INFO):
        calibrate_backbone(made.model, made.cfg, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(p, p.requires_grad) for p in made.model.parameters()] == parameters and made.model.training
    wanted = calibrate_norms(
        copy.deepcopy(before.backbone.bottom_up), with_batch_norm(weights), first_images(5)
    ).state_dict()
    for name, value in made.model.backbone.bottom_up.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-4)
        assert torch.equal(value, before.backbone.bottom_up.state_dict()[name]) != (".norm." in name)
    others = {n: p for n, p in before.named_parameters() if "bottom_up" not in n}
    assert all(torch.equal(p, dict(made.model.named_parameters())[name]) for name, p in others.items())
    frozen = made.model.backbone.bottom_up.stem.conv1.norm
    assert not frozen.weight.requires_grad and frozen.calibration_error is not None
    assert f"{len(group_norms(made.model))} norms are calibrated" in caplog.text


@pytest.fixture
def dataset():
    """Registers a function as the dataset "own"."""
    yield lambda records: DatasetCatalog.register("own", records)
    DatasetCatalog.remove("own")


def test_images_are_the_first_ones_by_their_numbers(weights, tmp_path, dataset):
    """Not by their place in the file or their names, and 2 is before 10."""
    records = DatasetCatalog.get("gng_shapes_train_separated")[:12]
    dataset(lambda: [{**record, "image_id": 11 - i} for i, record in enumerate(records)])
    mine, listed = (trainer(weights, "MODEL.RESNETS.NORM", "GN1", output=tmp_path).model for _ in range(2))
    calibrate_backbone(mine, config(weights, "DATASETS.TRAIN", "('own',)"), 3)
    bottom_up = listed.backbone.bottom_up
    calibrate_norms(bottom_up, with_batch_norm(weights), first_images(3, records[::-1]))
    torch.testing.assert_close(mine.backbone.bottom_up.state_dict(), bottom_up.state_dict(), rtol=1e-4, atol=1e-4)


def test_what_a_dataset_draws_is_not_missing_in_the_training(weights, tmp_path, dataset):
    def shuffled():
        records = DatasetCatalog.get("gng_shapes_train_separated")
        random.shuffle(records), np.random.rand(), torch.rand(1)
        return records

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    dataset(shuffled)
    model, before = trainer(weights, "MODEL.RESNETS.NORM", "GN1", output=tmp_path).model, states()
    calibrate_backbone(model, config(weights, "DATASETS.TRAIN", "('own',)"), 1)
    assert states() == before


def test_only_norms_that_the_file_has_are_calibrated(weights, tmp_path, caplog):
    state = saved(weights)
    for name in [n for n in state if ".res5." in n and ("1.conv2" in n or n.endswith("0.conv1.weight"))]:
        del state[name]
    torch.save({"model": state}, tmp_path / "part.pth")
    made = trainer(tmp_path / "part.pth", "MODEL.RESNETS.NORM", "GN1", output=tmp_path)
    calibrate_backbone(made.model, made.cfg, 2)
    fresh = [n for n, norm in group_norms(made.model).items() if norm.calibration_error is None]
    assert fresh == ["res5.0.conv1.norm", "res5.1.conv2.norm"]  # its convolution is missing; it is missing itself
    assert "2 have no counterpart in the reference (res5.0.conv1.norm, res5.1.conv2.norm)" in caplog.text
    assert (made.model.backbone.bottom_up.res5[1].conv2.norm.weight == 1).all()


def caffe2(path):
    """As MSRA/R-50.pkl is: Caffe2's names, statistics folded into a scale and a bias. Of an R-18's stem."""
    draw = np.random.default_rng(0)
    content = {"conv1_w": draw.normal(size=(64, 3, 7, 7)).astype(np.float32) / 12}
    content["res_conv1_bn_s"] = draw.normal(size=64).astype(np.float32)
    content["res_conv1_bn_b"] = draw.normal(size=64).astype(np.float32)
    path.write_bytes(pickle.dumps(content))
    return content


def test_folded_statistics_are_mean_0_and_variance_1(tmp_path, shapes):
    content = caffe2(tmp_path / "R.pkl")
    made = trainer(tmp_path / "R.pkl", "MODEL.RESNETS.NORM", "GN1", output=tmp_path)
    calibrate_backbone(made.model, made.cfg, 3)
    stem, images = made.model.backbone.bottom_up.stem.conv1, first_images(3)
    with torch.no_grad():
        ours = torch.cat([stem(image).flatten(2) for image in images], 2).double()
        theirs = [
            nn.functional.conv2d(image, torch.tensor(content["conv1_w"]), stride=2, padding=3) for image in images
        ]
    scale, bias = (torch.tensor(content[f"res_conv1_bn_{key}"])[:, None] for key in "sb")
    theirs = torch.cat([x.flatten(2) for x in theirs], 2).double() * scale + bias
    capped = stem.norm.weight.abs() > 9.99 * scale.abs().max()
    torch.testing.assert_close(ours.mean(2)[0], theirs.mean(2)[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.std(2)[0][~capped], theirs.std(2)[0][~capped], rtol=2e-6, atol=0)
    assert [n for n, m in group_norms(made.model).items() if m.calibration_error is not None] == ["stem.conv1.norm"]


def test_standardized_convolutions_are_plain_in_the_reference(weights, tmp_path, caplog):
    made = trainer(weights, "MODEL.RESNETS.NORM", "GN1+WS", output=tmp_path)
    calibrate_backbone(made.model, made.cfg, 2)
    assert type(made.model.backbone.bottom_up.stem.conv1).__name__ == "WSConv2d"
    errors = [norm.calibration_error for norm in group_norms(made.model).values()]
    assert errors[0] > 0.05
    assert "standardized" in caplog.text


def test_a_run_that_goes_on_is_not_calibrated_again(weights, tmp_path, monkeypatch):
    calibrated = []
    monkeypatch.setattr(engine, "calibrate_backbone", lambda *args: calibrated.append(args))
    args = SimpleNamespace(eval_only=False, resume=True, calibrate_norms=3, config_file=CONFIG)
    cfg = config(weights, "MODEL.RESNETS.NORM", "GN1", output=tmp_path)
    for steps in (1, 2):  # the first run finds no checkpoint
        cfg.SOLVER.MAX_ITER = steps
        engine.train_or_evaluate(cfg, args)
    ((model, given, number),) = calibrated
    assert isinstance(model, nn.Module) and (given, number) == (cfg, 3)


def test_other_forms_of_a_model_are_calibrated_as_it_is(weights, tmp_path):
    plain, *others = (trainer(weights, "MODEL.RESNETS.NORM", "GN1", output=tmp_path).model for _ in range(4))
    cfg = config(weights)
    calibrate_backbone(plain, cfg, 2)
    fuse_norms(others[0]), recompute_norms(others[1])
    others[2] = torch.compile(others[2], backend="eager")
    for other in others:
        calibrate_backbone(other, cfg, 2)
        found = group_norms(getattr(other, "_orig_mod", other))
        for name, norm in group_norms(plain).items():
            assert torch.equal(found[name].weight, norm.weight) and torch.equal(found[name].bias, norm.bias)


def test_a_norm_without_affine_is_left_and_named(weights, tmp_path, caplog):
    made = trainer(weights, "MODEL.RESNETS.NORM", "GN1", output=tmp_path)
    made.model.backbone.bottom_up.stem.conv1.norm = GroupNorm(1, 64, affine=False)
    calibrate_backbone(made.model, made.cfg, 2)
    assert "1 have no weight and bias of their own (stem.conv1.norm)" in caplog.text
    assert made.model.backbone.bottom_up.res2[0].conv1.norm.calibration_error is not None


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_backbone_without_group_norms_is_left(norm, weights, tmp_path):
    made = trainer(weights, "MODEL.RESNETS.NORM", norm, output=tmp_path)
    before = copy.deepcopy(made.model.state_dict())
    calibrate_backbone(made.model, made.cfg, 2)
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_weights_without_batch_norms_are_refused(tmp_path, shapes):
    torch.save({"model": build_model(config(None)).state_dict()}, tmp_path / "gn.pth")
    for path in (str(tmp_path / "gn.pth"), ""):
        made = trainer(path, output=tmp_path)
        message = rf"^the backbone cannot be calibrated: MODEL\.WEIGHTS '{path}' holds no batch norms"
        with pytest.raises(InputError, match=message):
            calibrate_backbone(made.model, made.cfg, 2)


@pytest.mark.parametrize(
    "number, training, message",
    [
        (0, "('gng_shapes_train_separated',)", "num_images is 0, and at least 1 is needed"),
        (-3, "('gng_shapes_train_separated',)", "num_images is -3, and"),
        (5, "()", r"DATASETS.TRAIN \(\) has no images"),
    ],
)
def test_no_images_are_named(number, training, message, weights, tmp_path):
    made = trainer(weights, "MODEL.RESNETS.NORM", "GN1", output=tmp_path)
    with pytest.raises(InputError, match=message):
        calibrate_backbone(made.model, config(weights, "DATASETS.TRAIN", training), number)


def test_the_warning_of_lost_weights_names_the_flag(weights, tmp_path, caplog):
    trainer(weights, "MODEL.RESNETS.NORM", "GN1", output=tmp_path)
    assert "20 GroupNorm layers (backbone.bottom_up.stem.conv1.norm" in caplog.text
    assert "unless they are calibrated next: --calibrate-norms 64" in caplog.text


@pytest.mark.parametrize("resume", [False, True])
def test_an_evaluation_does_not_calibrate(resume, weights, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model.pth")
    words = [CONFIG, ["MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(tmp_path)]]
    with pytest.raises(InputError, match="--calibrate-norms fits norms before the first step, and --eval-only"):
        setup_job(*words, resume=resume, eval_only=True, calibrate_norms=3)


def test_what_is_no_config_is_named(tmp_path, shapes):
    model = build_model(config(None))
    with pytest.raises(InputError, match=r"calibrate_backbone\(model, cfg, num_images\): cfg is .* not int\."):
        calibrate_backbone(model, 64, 64)


def test_a_stride_that_the_weights_were_not_trained_with_is_a_warning(tmp_path, caplog, monkeypatch):
    caffe2(tmp_path / "MSRA-R-50.pkl")
    for stride in (True, False):
        caplog.clear()
        words = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]
        words += ["MODEL.RESNETS.STRIDE_IN_1X1", str(stride), "MODEL.RESNETS.NORM", "GN1"]
        made = trainer(tmp_path / "MSRA-R-50.pkl", *words, output=tmp_path)
        calibrate_backbone(made.model, made.cfg, 1)
        assert ("STRIDE_IN_1X1 True, and the config has False" in caplog.text) != stride


def train_net(script, weights, output, *flags):
    words = ["--dist-url", "auto", "--config-file", CONFIG, *flags, *RATE_NEAR_0, "MODEL.WEIGHTS", str(weights)]
    done = ready_process.run(script, [*words, "MODEL.RESNETS.NORM", "GN1", "OUTPUT_DIR", str(output)], forks=True)
    assert done.returncode == 0, done.stderr[-3000:]


OWN = """
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
import torch
from torch.nn.parallel import DistributedDataParallel
import gng_d2
from gng_d2.job.calibrate import calibrate_backbone

def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts + ["MODEL.DEVICE", "cpu"])
    default_setup(cfg, args)
    model = DistributedDataParallel(build_model(cfg))
    DetectionCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    calibrate_backbone(model, cfg, 3)
    torch.save({"model": model.module.state_dict()}, f"{cfg.OUTPUT_DIR}/{comm.get_rank()}.pth")

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, dist_url=args.dist_url, args=(args,))
"""


@pytest.mark.slow
def test_jobs_of_one_process_of_two_and_a_loop_without_a_trainer_agree(weights, tmp_path):
    """The learning rate is next to 0, so that what is saved is what the first step saw. The second process of the loop
    gets the affines of the first."""
    own = tmp_path / "own.py"
    own.write_text(OWN)
    train_net("tools/train_net.py", weights, tmp_path / "one", "--calibrate-norms", "3")
    train_net("tools/train_net.py", weights, tmp_path / "two", "--calibrate-norms", "3", "--num-gpus", "2")
    train_net(own, weights, tmp_path / "own", "--num-gpus", "2")
    one, two = saved(tmp_path / "one" / "model_final.pth"), saved(tmp_path / "two" / "model_final.pth")
    first, second = saved(tmp_path / "own" / "0.pth"), saved(tmp_path / "own" / "1.pth")
    made = trainer(weights, "MODEL.RESNETS.NORM", "GN1", output=tmp_path)
    calibrate_backbone(made.model, made.cfg, 3)
    names = [name for name in one if "bottom_up" in name and ".norm." in name]
    assert len(names) == 40
    for name in names:
        assert torch.equal(first[name], second[name])
        for other in (two, first, made.model.state_dict()):
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4)


def test_a_comparison_passes_the_flag_on_and_knows_it(weights, tmp_path):
    words = [
        CONFIG,
        ["GN1", "FrozenBN"],
        [0],
        str(tmp_path),
        ["MODEL.RESNETS.NORM"],
        [*RATE_NEAR_0, "MODEL.WEIGHTS", str(weights)],
    ]
    with_it, without = Comparison(*words, calibrate_norms=3), Comparison(*words)
    command = with_it.command(with_it.runs[0])
    assert command[command.index("--calibrate-norms") + 1] == "3"
    assert "--calibrate-norms" not in without.command(without.runs[0])
    without.claim_output()
    with pytest.raises(InputError, match="calibrate_norms: None there, 3 here"):
        with_it.claim_output()
    words[5] = RATE_NEAR_0
    with pytest.raises(InputError, match="--calibrate-norms fits group norms to batch norms, .* '' holds none"):
        Comparison(*words, calibrate_norms=3).check()


@pytest.mark.parametrize(
    "tool, number, message",
    [
        ("compare.py --norms GN1", "3", "error: --calibrate-norms fits group norms to batch norms"),
        ("compare.py --norms GN1", "0", "argument --calibrate-norms: 0: at least 1"),
        ("train_net.py", "3", "error: --calibrate-norms fits group norms to batch norms"),
        ("train_net.py", "-1", "argument --calibrate-norms: -1: at least 1"),
    ],
)
def test_the_flag_of_the_tools(tool, number, message, tmp_path, monkeypatch, capsys):
    tool, *words = tool.split()
    if tool == "compare.py":
        words += ["--seeds", "0", "--output", str(tmp_path)]
    words += ["--config-file", CONFIG, "--calibrate-norms", number]
    monkeypatch.setattr(sys, "argv", [tool, *words, "OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"tools/{tool}", run_name="__main__")
    assert message in f"{ended.value} {capsys.readouterr().err}"


def test_frozen_norms_of_the_reference_are_detectron2s(weights, tmp_path):
    """What this file takes for granted of Detectron2."""
    made = FrozenBatchNorm2d(3)
    assert torch.equal(made.running_mean, torch.zeros(3)) and made.eps == 1e-5
