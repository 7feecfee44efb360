"""The code and the commands in README and docs run as they stand there, and links lead somewhere."""

import argparse
import importlib
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest
import ready_process
import torch
from PIL import Image

from demo import NEXT
from gng_d2.job.build import build
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_config
from gng_d2.layers import GroupNorm
from reproduce import EXPERIMENTS

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]
TUTORIAL = Path("docs/own-data.md")
ROOT = Path.cwd()
QUICK = str(ROOT / "configs/quick/pfpn_pgn.yaml")

# in one process: a page trains a model before it predicts with it
pytestmark = pytest.mark.xdist_group("pages")

# What makes a run of the quick configs and of the example one of seconds
SMALL = (
    "MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.RPN.POST_NMS_TOPK_TRAIN 20 SOLVER.MAX_ITER 1 "
    "MODEL.RPN.POST_NMS_TOPK_TEST 10 "
    "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96 "
    "SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.WARMUP_ITERS 0 SOLVER.BASE_LR 0.0001 DATALOADER.NUM_WORKERS 0 "
    "MODEL.DEVICE cpu"
).split()
SAME_MODEL = SMALL[:4]


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def unbroken(text):
    """Lines that end in a backslash are one with the next."""
    return re.sub(r"\\\n\s*", "", text)


def commands(text):
    """The indented commands of a page, with their continuation lines, and those under tables of results."""
    text = re.sub(r"^```\{.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)  # of Sphinx
    indented = re.findall(r"^    (python tools/(?:.*\\\n)*.*)$", text, re.MULTILINE)
    below = re.findall(r"^`(python tools/[^`]+)`", text, re.MULTILINE)
    return [unbroken(command).split("    #")[0].strip() for command in (*indented, *below)]


def of_pages(find, pages=PAGES):
    return [
        pytest.param(found, id=f"{path.stem}-{number}")
        for path in pages
        for number, found in enumerate(find(path.read_text()), 1)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shapes):
    """Where the commands run: a copy of what a clone has, with the data that the pages name."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("tools", "configs", "gng_d2"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree("docs", root / "docs")
    (root / "datasets").symlink_to(shapes)
    drawn = shapes / "gng_shapes"
    for own in ("own_data", "own_semantic", "own_panoptic"):
        (shapes / own).mkdir()
    for split in ("train", "val"):
        instances = drawn / "annotations" / f"instances_{split}.json"
        panoptic = drawn / "annotations" / f"panoptic_{split}.json"
        for link, target in {
            f"own_data/{split}": drawn / split,
            f"own_data/{split}.json": instances,
            f"own_semantic/{split}": drawn / split,
            f"own_semantic/{split}_maps": drawn / f"panoptic_stuff_{split}",
            f"own_panoptic/{split}": drawn / split,
            f"own_panoptic/panoptic_{split}": drawn / f"panoptic_{split}",
            f"own_panoptic/panoptic_{split}.json": panoptic,
            f"own_panoptic/instances_{split}.json": instances,
        }.items():
            (shapes / link).symlink_to(target)
    Image.new("RGB", (96, 64), "gray").save(root / "photo.jpg")
    for name in ("pfpn_pgn", "faster_rcnn_pgn_ws"):
        run(root, f"python tools/train_net.py --config-file configs/quick/{name}.yaml")
    return root


def run(root, command, check=True):
    with tempfile.TemporaryDirectory(dir=root) as new:
        tool, *words = shortened([new if word == "DIR" else word for word in shlex.split(command)[1:]])
        done = ready_process.run(root / tool, words, cwd=root)
    assert not check or done.returncode == 0, command + "\n" + done.stdout[-1500:] + done.stderr[-3000:]
    return done


def shortened(words):
    tool, words = words[0], list(words[1:])
    text = " ".join(words)
    if tool.endswith("compare.py") and ("quick" in text or "own_" in text):
        for flag in ("--norms", "--seeds"):  # one of each
            at = words.index(flag) + 2
            while at < len(words) and not words[at].startswith("--"):
                words.pop(at)
    if tool.endswith(("train_net.py", "compare.py")) and ("quick" in text or "own_" in text):
        flags = {"--recompute-norms", "--fuse-norms", "--num-gpus"} & set(words)
        words += [*SMALL, *["DATASETS.TEST", "()"] * bool(flags)]  # other commands are evaluated
    if tool.endswith(("predict.py", "export.py")) and not re.search(r"--config-file \S+\.py\b", text):
        words += SMALL if "own_" in text else [*SAME_MODEL, "MODEL.DEVICE", "cpu"]
    return [tool, *words]


def each_once(params):
    """Without commands that an earlier page has too, but for the folder that it writes to and the number of seeds."""
    seen = {}
    for param in params:
        words = shortened(shlex.split(param.values[0])[1:])
        seen.setdefault(re.sub(r"--output \S+", "", " ".join(words)), param)
    return list(seen.values())


# ends at its check of what it was given: COCO, a GPU, weights or a dataset that is not here
LACKING = r"^error: .*(is not there|does not exist|not found|no images|cannot (be )?read|cannot be fetched|MNIST)"


def lacks(command):
    """What the command needs and a checkout does not have."""
    if "configs/quick" in command or "analyze_groups" in command or "own_" in command:
        return False
    return not re.search(r"reproduce.py (table1|table2|sweep|norm-cost|step-cost|memory|page)", command)


# long measurements: only that their command line is right
MEASUREMENTS = ("table1", "table2", "sweep", "gradients", "table3", "table4", "collapse", "retention", "finetune")
MEASUREMENTS += ("norm-cost", "step-cost", "memory")


@pytest.mark.slow
@pytest.mark.parametrize("command", each_once(of_pages(commands, [page for page in PAGES if page != TUTORIAL])))
def test_command(command, folder, monkeypatch):
    check(command, folder, monkeypatch)


@pytest.mark.slow
def test_commands_of_the_tutorial(folder, monkeypatch):
    """In their order, because they use what those before them made."""
    for command in commands(TUTORIAL.read_text()):
        check(command, folder, monkeypatch)


def check(command, folder, monkeypatch):
    if "reproduce.py" in command:
        words = shlex.split(command)
        assert words[2] in MEASUREMENTS
        parser = argparse.ArgumentParser()
        importlib.import_module(f"study.{EXPERIMENTS[words[2]][0]}").add_arguments(parser)
        parser.parse_args(words[3:])
    elif "compare.py" in command and re.search(r"configs/quick|_shapes\.yaml", command) and " DIR " in command:
        # what was measured: up to its trainings, as another command trains such a comparison
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", shlex.split(command.replace(" DIR ", f" {tempfile.mkdtemp(dir=folder)} "))[1:])
        monkeypatch.setattr("study.watch.train_all", lambda cluster: ())
        importlib.import_module("compare").main()
    elif "tools/gpu.py" in command and torch.cuda.is_available():
        pytest.skip("measures for minutes")
    elif lacks(command):
        done = run(folder, command, check=False)
        assert done.returncode == 1 and re.search(LACKING, done.stderr, re.MULTILINE), done.stderr[-2000:]
    else:
        run(folder, command)


def test_the_commands_at_the_end_of_the_demo():
    """Its tools take the arguments that it shows."""
    found = re.findall(r"python tools/(\w+)\.py (.+)", unbroken(NEXT.format(python="python")))
    assert [tool for tool, _ in found] == ["analyze_groups", "compare"]
    for tool, words in found:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [tool, *words.split()])
            assert importlib.import_module(tool).parse_args().config_file == "YOUR.yaml"


def from_batch_norms():
    """A config whose MODEL.WEIGHTS holds batch norms, and its model with PGN, which has loaded them."""
    torch.save({"model": build(load_config(QUICK, [*SMALL, "MODEL.RESNETS.NORM", "BN"])).state_dict()}, "bn.pth")
    cfg = load_config(QUICK, [*SMALL, "MODEL.RESNETS.NORM", "PGN", "MODEL.WEIGHTS", "bn.pth"])
    model = build(cfg)
    Checkpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    return {"cfg": cfg, "model": model}


@pytest.mark.slow
@pytest.mark.parametrize("code", of_pages(blocks))
def test_block(code, folder, monkeypatch):
    """Each in names of its own, so that any of them can be copied alone. `print(x)  # y` prints y."""
    monkeypatch.chdir(folder)
    predict, export = commands(Path(ROOT, "docs/predict-and-deploy.md").read_text())[:2]
    for made, command in {"predictions/results.json": predict, "model.pt": export}.items():
        if made in code and not Path(made).exists():
            run(folder, command)
    printed = []
    given = from_batch_norms() if "calibrate_backbone(" in code else {"cfg": load_config(QUICK)}
    exec(compile(code, "block", "exec"), {**given, "print": lambda *values: printed.append(" ".join(map(str, values)))})
    for name, norm in given["model"].backbone.bottom_up.named_modules() if "model" in given else ():
        assert not isinstance(norm, GroupNorm) or norm.calibration_error is not None, name
    expected = re.findall(r"^print\(.*\)  # (\S+)$", code, re.MULTILINE)
    assert [line for line in printed if line in expected] == expected


def test_links_lead_somewhere():
    for path in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_contributing_lists_every_place_that_names_the_norms():
    """A place knows a name if it has the pattern of one, GN/<c>, or one such norm of a fixed list of all kinds."""
    line = re.search(r"\*\*A norm name\*\*.*?\n- \*\*", Path("CONTRIBUTING.md").read_text(), re.DOTALL).group()
    files = [path for folder in ("gng_d2", "tools") for path in Path(folder).rglob("*.py")]
    files += [Path("README.md"), *Path("docs").glob("*.md")]
    shows_all = [str(path) for path in files if re.search(r"GN/<c>|`PGN`, `GN`.*`GN16`", path.read_text())]
    assert len(shows_all) > 4 and not [path for path in shows_all if f"`{path}`" not in line]
