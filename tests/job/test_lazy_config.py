"""Lazy configs: ours beside the YAML ones of their names, and in the tools."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import ready_process
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.lr_scheduler import LRMultiplier
from omegaconf import ListConfig

import analyze_groups
import predict
from command_line import run_tool
from gng_d2 import norm_table, practical_num_groups
from gng_d2.errors import InputError
from gng_d2.job.build import build, build_on_meta
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_any_config, load_config, norm_keys
from gng_d2.job.norm_keys import check_norm_keys
from gng_d2.layers.record import records_of

OURS = ["pfpn_pgn", "faster_rcnn_pgn_ws"]


@pytest.fixture(scope="module", params=OURS)
def pair(request):
    """A lazy config, the YAML config of the same name, and their models on the meta device."""
    lazy = load_any_config(f"configs/{request.param}.py")
    yaml = load_config(f"configs/{request.param}.yaml")
    return lazy, yaml, build_on_meta(lazy), build_on_meta(yaml)


def test_a_lazy_config_that_was_saved_is_no_yaml_config(tmp_path):
    LazyConfig.save(load_any_config("configs/pfpn_pgn.py"), str(tmp_path / "config.yaml"))
    with pytest.raises(InputError, match="config.yaml is a lazy .* that was saved as YAML. Give the .py file"):
        load_any_config(str(tmp_path / "config.yaml"))


def settings(value, depth=0):
    """What a module or another object of Detectron2's was made with, of numbers, names and lists."""
    if isinstance(value, (list, tuple, ListConfig)):
        return [settings(v, depth + 1) for v in value]
    if isinstance(value, dict):
        # a loss that a weight leaves out has that of 1
        return {k: settings(v, depth + 1) for k, v in value.items() if not (str(k).startswith("loss_") and v == 1)}
    if isinstance(value, (int, float, str, type(None))):
        return value
    if depth < 4 and type(value).__module__.startswith(("detectron2", "gng_d2")):
        own = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        return type(value).__name__, settings(own, depth + 1)
    return type(value).__name__


def test_models_are_those_of_the_yaml_configs(pair):
    _, _, lazy, yaml = pair
    assert norm_table(lazy) == norm_table(yaml) and "PGN" in str(norm_table(lazy))
    for tensors in ("named_parameters", "named_buffers"):
        a, b = ({n: (t.shape, t.requires_grad) for n, t in getattr(m, tensors)()} for m in (lazy, yaml))
        assert list(a.items()) == list(b.items())  # and in one order: seeds draw the same weights
    modules = dict(yaml.named_modules())
    assert [name for name, _ in lazy.named_modules()] == list(modules)
    for name, module in lazy.named_modules():
        assert settings(module) == settings(modules[name]), name


def test_pixels_are_those_of_the_yaml_configs(pair):
    lazy, yaml, *_ = pair
    assert (lazy.model.pixel_mean, lazy.model.pixel_std) == (yaml.MODEL.PIXEL_MEAN, yaml.MODEL.PIXEL_STD)


def augmentations(mapper):
    """Kinds, sides to choose from, and the longest side."""
    for augmentation in mapper.augmentations.augs:
        sides = set(getattr(augmentation, "short_edge_length", ()))
        assert len(sides) < 2 or not augmentation.is_range
        yield type(augmentation).__name__, sides, getattr(augmentation, "max_size", None)


def test_datasets_are_those_of_the_yaml_configs(pair):
    lazy, yaml, *_ = pair
    train, test = lazy.dataloader.train, lazy.dataloader.test
    assert ((train.dataset.names,), (test.dataset.names,)) == (yaml.DATASETS.TRAIN, yaml.DATASETS.TEST)
    assert train.dataset.get("filter_empty", True) == yaml.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert train.total_batch_size == yaml.SOLVER.IMS_PER_BATCH and train.num_workers == yaml.DATALOADER.NUM_WORKERS
    for loader, is_train in ((train, True), (test, False)):
        ours, theirs = instantiate(loader.mapper), DatasetMapper(yaml, is_train)
        assert list(augmentations(ours)) == list(augmentations(theirs))
        for field in ("is_train", "image_format", "instance_mask_format", "use_keypoint", "recompute_boxes"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert ours.use_instance_mask == theirs.use_instance_mask or not is_train


def test_the_solver_is_that_of_the_yaml_configs(pair):
    lazy, yaml, *models = pair
    lazy.optimizer.params.model = models[0]
    optimizers = instantiate(lazy.optimizer), build_optimizer(yaml, models[1])
    del lazy.optimizer.params["model"]
    kept = ("lr", "momentum", "weight_decay", "nesterov", "dampening")
    a, b = ([({k: g[k] for k in kept}, len(g["params"])) for g in optimizer.param_groups] for optimizer in optimizers)
    assert a == b and a[0][0]["lr"] == 0.02
    schedulers = (
        LRMultiplier(optimizers[0], instantiate(lazy.lr_multiplier), lazy.train.max_iter),
        build_lr_scheduler(yaml, optimizers[1]),
    )
    assert lazy.train.max_iter == yaml.SOLVER.MAX_ITER
    for step in [
        0,
        1,
        500,
        999,
        1000,
        *(s + d for s in yaml.SOLVER.STEPS for d in (-1, 0, 1)),
        yaml.SOLVER.MAX_ITER - 1,
    ]:
        rates = []
        for scheduler in schedulers:
            scheduler.last_epoch = step
            rates.append(scheduler.get_lr())
        assert rates[0] == pytest.approx(rates[1], rel=1e-6), step
    assert lazy.train.amp.enabled == yaml.SOLVER.AMP.ENABLED
    assert lazy.train.checkpointer.period == yaml.SOLVER.CHECKPOINT_PERIOD
    assert lazy.train.eval_period == yaml.TEST.EVAL_PERIOD
    assert (lazy.train.init_checkpoint, lazy.train.output_dir) == (yaml.MODEL.WEIGHTS, yaml.OUTPUT_DIR)


def test_a_lazy_config_is_saved_and_read_again(pair, tmp_path):
    """As Detectron2 does with that of a job."""
    lazy, _, model, _ = pair
    LazyConfig.save(lazy, str(tmp_path / "config.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "nothing in it needs a pickle"
    with torch.device("meta"):
        again = instantiate(LazyConfig.load(str(tmp_path / "config.yaml")).model)
    assert norm_table(again) == norm_table(model)


@pytest.mark.parametrize(
    "word, message",
    [
        ("MODEL.FPN.NORM", "missing EQUAL.* A lazy config takes path.key=value"),
        ("model.roi_heads.num_classes.x=1", "model.roi_heads.num_classes is not a config"),
        ("dataloader.evaluator.3.x=1", "list index out of range"),
        ("~model.backbone=1", "deletion is not yet a supported override"),
        ("model.backbone.norm=[PGN", "no viable alternative"),
        ("model=3", "has no `model` that is a LazyCall"),
    ],
)
def test_overrides_that_cannot_be_used(word, message):
    with pytest.raises(InputError, match=message) as error:
        load_any_config("configs/pfpn_pgn.py", [word])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("word", ["model.backbon.norm=PGN", "model.backbone.nrom=PGN"])
def test_a_mistyped_override_of_the_model_is_named_when_it_is_built(word):
    with pytest.raises(InputError, match="cannot be built: .*unexpected keyword argument '(backbon|nrom)'"):
        build_on_meta(load_any_config("configs/pfpn_pgn.py", [word]))


def test_overrides():
    words = ["model.backbone.norm=GN/16", "dataloader.evaluator.0.output_dir=x", "+train.seed=3", "train.max_iter=7"]
    cfg = load_any_config("configs/pfpn_pgn.py", words)  # the FPN's norm is not in the config, but an argument
    assert (cfg.model.backbone.norm, cfg.dataloader.evaluator[0].output_dir) == ("GN/16", "x")
    assert (cfg.train.seed, cfg.train.max_iter) == (3, 7)
    table = norm_table(build_on_meta(cfg))
    assert {row.norm for row in table if "fpn" in row.name} == {"GN/16"}
    cfg = load_any_config("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py")  # of Detectron2's zoo
    assert dict(norm_keys(cfg))["model.sem_seg_head.norm"] == "GN"


@pytest.mark.parametrize(
    "text, message",
    [
        ("model = (", r"mine.py has syntax error! '\(' was never closed"),
        ("return 3", "mine.py: 'return' outside function"),
        ("train = dict(x=1)", "mine.py has no `model` that is a LazyCall.* It has train"),
        ("import torch\nmodel = torch.nn.Linear(1, 1)", "mine.py has no `model`.* It has nothing"),
        ("model = dict(x=1)", "mine.py has no `model`"),
    ],
)
def test_files_that_are_no_lazy_config(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=message):
        load_any_config(str(tmp_path / "mine.py"))


def test_what_cannot_be_built_is_named():
    with pytest.raises(InputError, match="^model.backbone.norm: unknown norm 'PNG'; did you mean 'PGN'"):
        build_on_meta(load_any_config("configs/pfpn_pgn.py", ["model.backbone.norm=PNG"]))
    cfg = load_any_config("configs/pfpn_pgn.py", ["model.roi_heads.new=1"])  # takes **kwargs
    with pytest.raises(InputError, match="cannot be built: TypeError: .*'new'"):
        build_on_meta(cfg)


NAMES = """
from detectron2.config import LazyCall as L
from detectron2.layers import get_norm
from torch import nn

class Net(nn.Module):
    def __init__(self, norm, head_norm, parts=()):
        super().__init__()
        self.conv = nn.Conv2d(256, 64, 1)
        self.norm = get_norm(norm, 64)
        self.head = nn.Conv2d(64, 64, 1)
        if head_norm == "GN":
            self.head_norm = nn.GroupNorm(32, 64)

model = L(Net)(norm="PGN", head_norm="PGN", parts=[dict(norm="GN1")])
"""
NAMED = """
names = dict(head="PGN")
"""


def test_a_head_that_compares_names_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(NAMES)
    cfg = load_any_config(str(tmp_path / "mine.py"))
    keys = {"model.norm": "PGN", "model.head_norm": "PGN", "model.parts.0.norm": "GN1"}
    assert dict(norm_keys(cfg)) == keys
    with pytest.raises(InputError, match="^model.head_norm: PGN makes no norm at head_norm, where GN makes GN"):
        check_norm_keys(cfg, build(cfg, "cpu"))
    assert dict(norm_keys(cfg)) == keys, "left as it was"
    check_norm_keys(load_any_config(str(tmp_path / "mine.py"), ["model.head_norm=GN"]))
    (tmp_path / "mine.py").write_text(NAMES.replace('head_norm="PGN"', 'head_norm="${names.head}"') + NAMED)
    with pytest.raises(InputError, match="^model.head_norm: PGN makes no norm at head_norm"):
        check_norm_keys(load_any_config(str(tmp_path / "mine.py")))
    with pytest.raises(InputError, match="^the config's model: Interpolation key 'nothing' not found"):
        check_norm_keys(load_any_config(str(tmp_path / "mine.py"), ["model.norm=${nothing}"]))


def analyze(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["analyze_groups.py", *map(str, words)])
    try:
        return run_tool(analyze_groups.main)
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("kind", ["py", "yaml"])
def test_the_table_of_norms_of_ours(kind, monkeypatch, tmp_path, capsys):
    config = f"configs/pfpn_pgn.{kind}"
    assert analyze(monkeypatch, "--config-file", config, "--ours", "--json", tmp_path / "o.json") is None
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "o.json").read_text())
    assert len(rows) == 7 and all(row["name"].startswith("sem_seg_head") and row["name"] in out for row in rows)
    assert "backbone" not in out and out.splitlines()[-1] == "60 norms: 3 x 1, 4 x 32 groups; 53 x FrozenBN"
    override = ["model.sem_seg_head.norm=BN"] if kind == "py" else ["MODEL.SEM_SEG_HEAD.NORM", "BN"]
    status = analyze(monkeypatch, "--config-file", config, "--ours", *override)
    assert status.startswith("error: --ours: none of the model's norms is one of ours. It has 60 norms: 53 x FrozenBN")


REORDERED = """
from detectron2.config import LazyCall as L
from gng_d2 import PracticalGroupNorm
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = PracticalGroupNorm(16)
        self.conv = nn.Conv2d(3, width, 1)
        self.neck = nn.Conv2d(width, 16, 1)

    def forward(self, batch):
        return self.norm(self.neck(self.conv(batch[0]["image"][None])))

model = L(Net)(width=64)
train = dict(device="cpu")
"""


def test_norms_that_met_no_layer_are_found_by_running_the_model(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(REORDERED)
    words = ["--config-file", tmp_path / "mine.py", "--json", tmp_path / "o.json", "model.width=128"]
    assert analyze(monkeypatch, *words) is None
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert (row["n_in"], row["num_groups"]) == (128, practical_num_groups(128, 16))


def test_overrides_of_the_other_kind_are_named(monkeypatch):
    status = analyze(monkeypatch, "--config-file", "configs/pfpn_pgn.py", "MODEL.FPN.NORM", "PGN")
    assert status.startswith("error: config overrides 'MODEL.FPN.NORM PGN': ") and "takes path.key=value" in status
    for words in (["MODEL.FPN.NORM=PGN"], ["SEED", "1", "model.backbone.norm=PGN"], ["SEED=1", "SEED=2"]):
        status = analyze(monkeypatch, "--config-file", "configs/pfpn_pgn.yaml", *words)
        assert status.startswith(f"error: config overrides '{' '.join(words)}': ") and "pairs, KEY VALUE" in status


TINY = (
    "MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32 INPUT.MIN_SIZE_TEST 64 "
    "INPUT.MAX_SIZE_TEST 96 MODEL.RPN.POST_NMS_TOPK_TEST 20 TEST.DETECTIONS_PER_IMAGE 10 MODEL.DEVICE cpu "
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH 0.1 MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT 4"
).split()

# the model of the YAML config, and its data as lazy configs have them
TINY_LAZY = f"""
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, transforms as T
from detectron2.modeling import build_model
from gng_d2.job.config import load_config

def make(num_classes, sem_seg_head):
    return build_model(load_config("configs/quick/pfpn_pgn.yaml", {TINY}))

model = L(make)(num_classes=5, sem_seg_head=dict(num_classes=4))
dataloader = dict(test=dict(
    dataset=dict(names="gng_shapes_val_separated"),
    mapper=L(DatasetMapper)(
        is_train=False,
        image_format="BGR",
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)],
    ),
))
"""


@pytest.fixture
def predicted(shapes, tmp_path, monkeypatch):
    """Runs predict on two images with drawn weights; gives the exit status and the results in COCO's format."""
    (tmp_path / "tiny.py").write_text(TINY_LAZY)
    torch.manual_seed(0)
    Checkpointer(build_model(load_config("configs/quick/pfpn_pgn.yaml", TINY)), str(tmp_path)).save("model")
    images = sorted((shapes / "gng_shapes" / "val").iterdir())[:2]

    def run(config, *opts, flags=()):
        out = tmp_path / "out"
        words = ["--config-file", config, "--weights", tmp_path / "model.pth", "--input", *images]
        words += ["--output", out, "--json", out / "r.json", *flags, *opts]
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
        try:
            run_tool(predict.main)
        except SystemExit as error:
            return error.code, None
        return None, json.loads((out / "r.json").read_text())

    return run


@pytest.mark.slow
def test_predictions_are_those_of_the_yaml_config(predicted, tmp_path):
    lazy = tmp_path / "tiny.py"
    status, results = predicted(lazy)
    assert (status, results) == predicted("configs/quick/pfpn_pgn.yaml", *TINY)
    assert status is None and {r["image_id"] for r in results} == {1, 2}
    scores = np.array([r["score"] for r in results])
    median = np.median(scores)
    assert len(predicted(lazy, flags=["--threshold", str(median)])[1]) == (scores >= median).sum()


def test_what_predict_needs_of_a_lazy_config_is_named(predicted, tmp_path):
    lazy = tmp_path / "tiny.py"
    status, _ = predicted(lazy, "model.num_classes=4")
    assert status.startswith(
        "error: model.num_classes is 4, but dataset 'gng_shapes_val_separated' has 5 thing_classes"
    )
    status, _ = predicted(lazy, "dataloader.test.dataset.names=mine_val")
    assert status.startswith("error: dataloader.test.dataset.names: no dataset named 'mine_val' is registered")
    assert "dataloader.test.dataset.names=[] calls the classes by their numbers" in status
    assert predicted(lazy, "dataloader.test.dataset.names=[]", "dataloader.test.mapper.image_format=RGB")[0] is None
    categories = json.loads((tmp_path / "out" / "r_images.json").read_text())["categories"]
    assert [c["name"] for c in categories] == ["0", "1", "2", "3", "4", "0", "1", "2", "3"]
    lazy.write_text(TINY_LAZY.replace("mapper=", "other="))
    status, _ = predicted(lazy)
    assert status.startswith("error: the lazy config has no dataloader.test.mapper")


SMALL = (
    "train.max_iter=2 train.device=cpu train.init_checkpoint='' dataloader.train.total_batch_size=1 "
    "dataloader.train.num_workers=0 dataloader.test.num_workers=0 model.roi_heads.num_classes=5 "
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64] model.backbone.bottom_up.freeze_at=0 "
    "dataloader.test.mapper.augmentations.0.short_edge_length=64 optimizer.lr=0.0001 "
    "dataloader.train.dataset.names=gng_shapes_train{0} dataloader.test.dataset.names=gng_shapes_val{0}"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_detectron2s_own_tool_trains_them(name, shapes, tmp_path):
    tool = importlib.util.find_spec("tools.lazyconfig_train_net").origin
    opts = SMALL.format("_separated" if name == "pfpn_pgn" else "").split()
    if name == "pfpn_pgn":
        opts += ["model.sem_seg_head.num_classes=4", "dataloader.train.mapper.instance_mask_format=bitmask"]
    opts.append(f"train.output_dir={tmp_path}")
    # the dataset of the tests is registered in a ready process
    done = ready_process.run(tool, ["--config-file", f"configs/{name}.py", *opts])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert metrics[-1].keys() >= ({"panoptic_seg/PQ", "sem_seg/mIoU"} if name == "pfpn_pgn" else {"bbox/AP"})
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)
    norms = {path: record["num_groups"] for path, record in records_of(weights["model"]).items()}
    expected = {
        r.name: r.num_groups for r in norm_table(build_on_meta(load_any_config(f"configs/{name}.py"))) if r.num_groups
    }
    assert norms == expected
