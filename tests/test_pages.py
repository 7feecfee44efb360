"""The code and the commands in README and docs run as they stand there, and their numbers are the measured ones."""

import json
import re
import shlex
import shutil
import tempfile
from math import log2
from pathlib import Path
from statistics import geometric_mean, mean

import pytest
import ready_process
import torch
from PIL import Image

from gng_d2.job.build import build, build_on_meta
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_config
from gng_d2.layers import GroupNorm
from gng_d2.models.norm_table import norm_table
from study.goals import fused_goals
from study.intervals import half_interval, mean_with_interval
from study.norm_cost import NormCostRow
from study.report import ComparisonRow, difference_interval
from study.retention import IMAGES, RetentionRow
from study.rows import read_rows

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


def commands(text):
    """The indented commands of a page, with their continuation lines, and those under tables of results."""
    text = re.sub(r"^```\{.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)  # of Sphinx
    indented = re.findall(r"^    (python tools/(?:.*\\\n)*.*)$", text, re.MULTILINE)
    below = re.findall(r"^`(python tools/[^`]+)`", text, re.MULTILINE)
    return [re.sub(r"\\\n\s*", "", command).split("    #")[0].strip() for command in (*indented, *below)]


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
        parser = __import__("argparse").ArgumentParser()
        module = __import__("importlib").import_module(f"study.{page_module(words[2])}")
        module.add_arguments(parser)
        parser.parse_args(words[3:])
    elif "compare.py" in command and re.search(r"configs/quick|_shapes\.yaml", command) and " DIR " in command:
        # what was measured: up to its trainings, as another command trains such a comparison
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", shlex.split(command.replace(" DIR ", f" {tempfile.mkdtemp(dir=folder)} "))[1:])
        monkeypatch.setattr("study.watch.train_all", lambda cluster: ())
        __import__("compare").main()
    elif "tools/gpu.py" in command and torch.cuda.is_available():
        pytest.skip("measures for minutes")
    elif lacks(command):
        done = run(folder, command, check=False)
        assert done.returncode == 1 and re.search(LACKING, done.stderr, re.MULTILINE), done.stderr[-2000:]
    else:
        run(folder, command)


def test_the_commands_at_the_end_of_the_demo():
    """Its tools take the arguments that it shows."""
    import demo

    shown = re.sub(r"\\\n\s*", "", demo.NEXT.format(python="python"))
    found = re.findall(r"python tools/(\w+)\.py (.+)", shown)
    assert [tool for tool, _ in found] == ["analyze_groups", "compare"]
    for tool, words in found:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [tool, *words.split()])
            assert __import__(tool).parse_args().config_file == "YOUR.yaml"


def page_module(name):
    import reproduce

    return reproduce.EXPERIMENTS[name][0]


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


def test_numbers_of_the_survey():
    summary, *rows = json.loads(Path("docs/convert_timm.json").read_text())
    rows = [row for row in rows if row.get("norms")]
    assert summary["wrong"] == 0 and summary["norms"] == sum(row["norms"] for row in rows)
    said = (
        f"{len(rows)} of {summary['of']} families have such norms, {summary['norms']} in all: {summary['converted']} "
        f"have the groups of their layer, {summary['own_width']} their own width, {summary['fewer']} fewer "
        f"groups behind a global pooling, {summary['left']} were left, 0 were wrong"
    )
    assert said in Path("docs/any-model.md").read_text().replace("\n", " ")


def prose(path):
    """The text of a page without its line breaks."""
    return " ".join(Path(path).read_text().split())


def difference(ours, theirs):
    """Of two lists by seed, as the pages write it: "0.7 (-4.8 to +6.2)"."""
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    middle, half = mean(values), half_interval(values)
    return f"{middle:.1f} ({middle - half:+.1f} to {middle + half:+.1f})"


def measured(name):
    return json.loads(Path(f"docs/results/{name}.json").read_text())


def test_numbers_of_choosing_g():
    page = prose("docs/choosing-g.md")
    camvid, bccd = (
        {row["norm"]: row["difference"] for row in measured(name) if row["metric"] == metric}
        for name, metric in (("camvid_semantic_fpn", "mIoU"), ("bccd_faster_rcnn", "AP"))
    )
    assert f"instance norm (`GN/1`) is {camvid['GN/1']:.1f} mIoU ahead of `GN`" in page
    behind = f"PGN is {-camvid['PGN']:.1f} behind, `GN/16` {-camvid['GN/16']:.1f} and G = 1 {-camvid['GN1']:.1f}"
    assert behind in page
    assert f"`GN/1` is {-bccd['GN/1']:.1f} AP behind `GN`" in page
    (ap75,) = (r["difference"] for r in measured("bccd_faster_rcnn") if (r["norm"], r["metric"]) == ("GN/1", "AP75"))
    assert f"and {-ap75:.1f} in AP75" in page
    ahead = f"PGN is {-bccd['PGN']:.1f} AP behind, `GN/16` {bccd['GN/16']:.1f} ahead and G = 1 {bccd['GN1']:.1f}"
    assert ahead in page
    beds = [{norm: difference or 0 for norm, difference in bed.items()} for bed in (camvid, bccd)]  # GN's own is None
    assert f"`GN` was at most {max(max(bed.values()) for bed in beds):.1f} points behind the best" in page
    assert all(min(bed, key=bed.get) not in ("GN", "GN/16") for bed in beds), "neither was the worst"
    assert max(camvid["PGN"], bccd["PGN"]) < 0, "nothing measured here on real images has PGN ahead"


def test_numbers_of_the_readme():
    text = Path("README.md").read_text()
    readme = " ".join(text.split())
    assert len(text.splitlines()) <= 100
    demo = json.loads(Path("docs/demo.json").read_text())
    for when in ("before", "after"):
        assert " | ".join(f"{demo[when][key]:.1f}" for key in ("PQ", "PQ_th", "PQ_st")) in readme
    beds = [
        {row.norm: row for row in read_rows(f"docs/results/{name}.json", ComparisonRow) if row.metric == metric}
        for name, metric in (("camvid_semantic_fpn", "mIoU"), ("bccd_faster_rcnn", "AP"))
    ]
    for norm in ("GN/1", "GN/16", "PGN", "GN1"):
        cells = ["{:+.1f} ({:+.1f} to {:+.1f})".format(b[norm].difference, *difference_interval(b[norm])) for b in beds]
        assert f"| `{norm}` | {' | '.join(cells)} |" in readme
    assert max(bed["PGN"].difference for bed in beds) < 0, "PGN is ahead of GN on neither"


def test_numbers_of_what_group_norm_costs():
    readme, page = map(prose, ("README.md", "docs/speed-and-memory.md"))
    ratios = {
        name: geometric_mean(
            row["ratio_to_native_gn32"]
            for row in measured("benchmark_norm_cpu")
            if (row["direction"], row["implementation"]) == ("forward", name)
        )
        for name in ("ours", "native")
    }
    assert f"Forward, PGN's norms take {ratios['ours']:.2f} times as long as `GN`'s do in PyTorch." in readme
    ours = f"the forward pass of PGN's norms takes {ratios['ours']:.2f} times as long as that of GN's in PyTorch, and "
    assert f"{ours}with PyTorch's op {ratios['native']:.2f} times." in page
    rows = {
        row["recomputed"]: row
        for row in measured("memory_cpu")
        if (row["model"], row["norm"]) == ("faster_rcnn", "PGN+WS") and not row.get("fused")
    }
    kept, again = (f"{rows[recomputed]['peak_ratio']:.2f} times" for recomputed in (False, True))
    high, wide = rows[True]["size"]
    assert f"of Faster R-CNN, one image of {high} x {wide} on a CPU, is {kept} FrozenBN's with `PGN+WS`" in readme
    assert (
        f"everywhere, and {again} after `gng_d2.recompute_norms(model)`, with the same gradients, bit by bit." in readme
    )
    peaks = f"one image of {high} x {wide}, peaks at {kept} FrozenBN's memory, and with `--recompute-norms` at {again}."
    assert f"under PGN+WS, {peaks}" in page


def test_the_time_of_recomputation_is_within_noise():
    readme, page = map(prose, ("README.md", "docs/speed-and-memory.md"))
    rows = measured("benchmark_train_cpu")
    ratio = {(row["model"], row["fused"]): row["ratio_to_kept"] for row in rows if row["recomputed"]}
    assert len(ratio) == 4
    ((high, wide),) = {tuple(row["size"]) for row in rows}
    took = f"took {min(ratio.values()):.2f} to {max(ratio.values()):.2f} times as long"
    assert f"Steps at {high} x {wide} then {took}, which is as far as two runs of one program differed." in readme
    assert (
        f"a step at {high} x {wide}, of Faster R-CNN and Panoptic FPN, with and without `--fuse-norms`, {took}" in page
    )
    gn = {}  # PyTorch's op, with our kernels on and off
    for row in rows:
        if row["norm"] == "GN":
            gn.setdefault(row["model"], []).append(row["step_milliseconds"])
    assert {len(times) for times in gn.values()} == {2}
    noise = f"{max(max(times) / min(times) for times in gn.values()):.2f}"
    assert f"which it does not use) differed by a factor of up to {noise}." in page
    assert noise == f"{max(ratio.values()):.2f}"
    both, alone = ([ratio[model, fused] for model in ("faster_rcnn", "pfpn")] for fused in (True, False))
    said = "took {:.2f} times as long (Faster R-CNN) and {:.2f} times (Panoptic FPN) beside `--fuse-norms`".format(
        *both
    )
    assert f"{said}, and {alone[0]:.2f} and {alone[1]:.2f} times without it." in page
    assert min(both) > max(alone), "fused norms are not seen to cost less to compute again"


def test_numbers_of_fused_norms():
    rows = read_rows("docs/results/fused_norm_cpu.json", NormCostRow)
    measured = [goal.reached.split()[0] for goal in fused_goals(rows) if "geometric mean" in (goal.reached or "")]
    to_parts, to_frozen, _, to_three, to_frozen_three, _ = measured
    page = prose("docs/speed-and-memory.md")
    assert f"norm and ReLU take {to_parts} times as long as one after the other, and norm, addition and ReLU " in page
    assert f"ReLU {to_three} times. That is {to_frozen} and {to_frozen_three} times what Detectron2's FrozenBN" in page


def test_weight_standardization_does_not_decide():
    def behind(name, ws):
        values = {row["norm"]: row["values"][:3] for row in measured(name)}
        return [few - many for few, many in zip(values[f"GN1{ws}"], values[f"GN/1{ws}"], strict=True)]

    without, with_ws = behind("camvid_semantic_fpn", ""), behind("camvid_ws", "+WS")
    results, choosing = map(prose, ("docs/results.md", "docs/choosing-g.md"))
    assert f"weight standardization changes D by {difference(with_ws, without)[:4]} points" in results
    assert difference(with_ws, without)[5:] in results
    still = difference([-d for d in with_ws], [0, 0, 0]).replace("+", "")
    assert f"GN1 is still behind GN/1, by {still.replace(' (', ' mIoU (')}." in results
    number, low, _, high = still.replace("(", "").replace(")", "").split()
    assert f"by {number} mIoU ({low} to {high}, three seeds)" in choosing and float(low) > 0


def test_one_group_in_a_whole_detector_needs_weight_standardization():
    with_ws, without = (
        {row["norm"]: row["values"] for row in measured(name) if row["metric"] == "AP"}
        for name in ("bccd_faster_rcnn", "bccd_plain")
    )
    advantage = [
        [few - many for few, many in zip(half["GN1"], half["GN/1"], strict=True)] for half in (with_ws, without)
    ]
    pages = [prose(page) for page in ("docs/results.md", "docs/choosing-g.md", "README.md")]
    few, many = (difference(with_ws[norm], without[norm]) for norm in ("GN1", "GN/1"))
    assert f"GN1, which loses {few.replace('(', 'AP (')} when" in pages[0] and "(+" in few
    neither = difference(with_ws["GN"], without["GN"])
    assert f"not seen to lose any: {many}, and neither is GN: {neither}." in pages[0]
    assert all("(-" in text and "to +" in text for text in (many, neither))
    low = f"{difference(advantage[1], [0] * 3)}"
    assert f"the mean of D is {low.split()[0]}, which is within seed noise" in pages[0] and "to +" in low
    assert all(a > b for a, b in zip(*advantage)), "the direction of the hypothesis with each seed"
    lost = few.replace("+", "")
    assert f"{lost.replace(' (', ' AP less (')[:-1]}, three seeds)" in pages[1]
    assert f"without it `GN1` has {lost.replace(' (', ' AP less (')}." in pages[2]


def test_mean_and_variance_over_different_groups():
    values = {
        row["norm"]: row["values"] for name in ("camvid_semantic_fpn", "camvid_mixtures") for row in measured(name)
    }
    results, choosing = map(prose, ("docs/results.md", "docs/choosing-g.md"))
    best = max(("GN", "GN1", "GN/16", "GN/1", "PGN"), key=lambda norm: mean(values[norm]))
    assert best == "GN/1", "the best fixed number of groups here"

    def ahead(norm, of="GN/1", seeds=5):
        """With the seeds that both have, which are the first ones."""
        seeds = min(seeds, len(values[norm]), len(values[of]))
        return difference(values[norm][:seeds], values[of][:seeds]).replace(" (", " mIoU (")

    last = ahead("MIX-fixed-last")
    assert f"number of groups here, by {last}, and of GN by {ahead('MIX-fixed-last', 'GN')}. It" in results
    assert f"of instance norm by {last[:-1]}, five seeds)" in choosing and "(+" in last
    shared, to_last = ahead("MIX-shared"), ahead("MIX-shared", "MIX-fixed-last")
    assert f"ahead of instance norm by {shared}, and of `MIX-fixed-last` by {to_last}." in results and "(+" in shared
    fixed, of_three, learned = ahead("MIX-fixed"), ahead("MIX-fixed", seeds=3), ahead("MIX")
    assert f"`MIX-fixed` is ahead of instance norm by {fixed}, which is within seed noise." in results
    assert f"With the first three seeds alone it was {of_three}, and two" in results and "(+" in of_three
    assert (
        f"`MIX` is ahead by {learned}, within seed noise" in results and f"instance norm by {fixed}, within" in choosing
    )
    assert all("(-" in text and "to +" in text for text in (fixed, learned, to_last))
    assert mean(values["MIX-uniform"]) < mean(values["GN/1"][:4])
    learned = {}
    for row in measured("camvid_learned"):
        if row["run"] == "MIX" and row["under_test"]:
            learned.setdefault(row["name"], []).append(row["mixtures"])
    for name, seeds in learned.items():
        in_mean, in_variance = (
            2 ** mean(sum(weights[place] * log2(weights[0]) for weights in mixtures) for mixtures in seeds)
            for place in (1, 2)
        )
        last = name in {f"sem_seg_head.{of}.norm" for of in ("p2.0", "p3.0", "p4.2", "p5.4")}
        assert (in_mean < 1.5 if last else in_mean > 11.5) and 4.5 < in_variance < 13.5


def test_the_mean_over_single_channels_on_bccd():
    fixed = {row["norm"]: row["values"] for row in measured("bccd_faster_rcnn") if row["metric"] == "AP"}
    mixed = next(row["values"] for row in measured("bccd_mixtures") if row["metric"] == "AP")
    results, choosing = map(prose, ("docs/results.md", "docs/choosing-g.md"))
    assert max(fixed, key=lambda norm: mean(fixed[norm])) == "GN1"
    to_gn = difference(mixed, fixed["GN"])
    assert (
        f"with a difference of {to_gn}" in results
        and f"a difference of {to_gn.replace('(', '').replace(' -', ', -')}" in choosing
    )
    assert f"the best fixed number of groups here, by {difference(fixed['GN1'], mixed)}." in results
    plain = {row["norm"]: row["values"] for row in measured("bccd_plain") if row["metric"] == "AP"}
    assert mean(plain["MIX"]) > max(mean(values) for values in (*fixed.values(), mixed, plain["GN"])), "the highest"
    learned = [difference(plain["MIX"], values) for values in (fixed["GN1"], fixed["GN"], plain["GN"])]
    to_best, to_gn, to_plain = (text.replace(" (", " AP (") for text in learned)
    assert f"the best fixed number of groups here, by {to_best}, and of GN with it by {to_gn}." in results
    assert f"ahead of GN without weight standardization by {to_plain}, with each of the three seeds" in results
    assert all(ours > theirs for ours, theirs in zip(plain["MIX"], plain["GN"], strict=True)) and "(-" in to_plain
    assert all("(+" in difference(plain["MIX"], fixed[norm]) for norm in ("GN", "GN1", "GN/16", "GN/1"))
    more = learned[0].replace(" (", " AP more than G = 1 with it (")
    assert f"on BCCD {more[:-1]}, three seeds)" in choosing
    assert f"`GN` without weight standardization is {learned[2].replace(' (', ' AP behind it (')}, which" in choosing
    assert f"has {difference(mixed, fixed['GN/1']).replace(' (', ' AP less (')}." in results


def test_three_times_as_long():
    long, short = (
        {row["norm"]: row["values"] for row in measured(name)} for name in ("camvid_long", "camvid_semantic_fpn")
    )
    at_first, at_last = (
        [instance - group for instance, group in zip(values["GN/1"][:3], values["GN"][:3])] for values in (short, long)
    )
    advantage, before = difference(long["GN/1"], long["GN"]), f"where it was {mean(at_first):.1f}"
    changed, larger = difference(at_last, at_first), sum(b > a for a, b in zip(at_first, at_last))
    results, choosing = map(prose, ("docs/results.md", "docs/choosing-g.md"))
    assert f"Instance norm's advantage is {advantage} mIoU, {before} after 1,200 steps" in results
    assert f"Seed by seed it changed by {changed}: it became smaller with one seed and larger with two" in results
    assert larger == 2 and "(-" in changed and "to +" in changed and "(-" in advantage
    shown = advantage.replace("(", "mIoU](results.md#camvid-three-times-as-long) (")
    assert f"[{shown[:-1]}, three seeds), {before}. " in choosing
    assert all(round(mean(long[norm]) - mean(short[norm][:3])) == 6 for norm in ("GN", "GN/1"))


def test_pretrained_weights_in_the_readme():
    """Its table: a classifier before and detectors after fine-tuning, as loaded and calibrated."""
    readme = Path("README.md").read_text()
    rows = read_rows("docs/results/retention_caltech101.json", RetentionRow)

    def classifier(norm, affine):
        return [row.old_head for row in rows if (row.norm, row.affine) == (norm, affine) and row.images in (0, IMAGES)]

    def detector(bed, norm, affine):
        (row,) = (r for r in measured(f"{bed}_{affine}") if (r["norm"], r["metric"]) in ((norm, "mIoU"), (norm, "AP")))
        return row["values"]

    beds = "camvid", "bccd"
    frozen = [classifier("BN", "trained"), *(detector(bed, "FrozenBN", "pretrained") for bed in beds)]
    assert f"| batch norm, frozen | {' | '.join(map(mean_with_interval, frozen))} |" in readme
    for norm in ("GN1", "GN/16", "PGN"):
        loaded = [classifier(norm, "kept"), *(detector(bed, norm, "pretrained") for bed in beds)]
        calibrated = [classifier(norm, "calibrated"), *(detector(bed, norm, "calibrated") for bed in beds)]
        cells = [f"{mean(a):.1f} → {mean_with_interval(b)}" for a, b in zip(loaded, calibrated, strict=True)]
        assert f"| `{norm}` | {' | '.join(cells)} |" in readme


def test_how_many_images_calibration_takes():
    rows = read_rows("docs/results/retention_caltech101.json", RetentionRow)

    def right(norm, images):
        return [row.old_head for row in rows if (row.norm, row.affine, row.images) == (norm, "calibrated", images)]

    more = {norm: difference(right(norm, 256), right(norm, IMAGES)) for norm in ("GN1", "GN/16", "PGN")}
    assert all("(-" in interval for interval in more.values()), "not beyond seed noise"
    page = prose("docs/from-batch-norm.md")
    assert f"by {more['GN1']} points under GN1, {more['GN/16']} under GN/16, {more['PGN']} under PGN." in page
    fewer = {
        (norm, images): difference(right(norm, IMAGES), right(norm, images))
        for norm in ("GN1", "GN/64", "GN/32", "GN/16", "PGN", "GN/1")
        for images in (16, 4)
    }
    lost = {key: text for key, text in fewer.items() if "(+" in text and "(+0.0" not in text}
    assert list(lost) == [("GN/32", 4), ("GN/16", 4), ("PGN", 16), ("PGN", 4)]
    by_16 = lost["PGN", 16].replace("+", "")
    said = f"16 images cost PGN {by_16} of its {mean(right('PGN', IMAGES)):.1f} points, and the other norms nothing"
    assert f"{said} beyond seed noise." in page
    points = [lost[norm, 4].split()[0] for norm in ("GN/32", "GN/16", "PGN")]
    assert "4 images cost GN/32 {} points, GN/16 {} and PGN {}, and the others nothing".format(*points) in page


def test_what_weight_standardization_leaves_of_them():
    rows = read_rows("docs/results/retention_ws_caltech101.json", RetentionRow)

    def right(norm, affine, head):
        return [getattr(row, head) for row in rows if (row.norm, row.affine) == (norm, affine)]

    for norm in ("GN1+WS", "GN/16+WS"):
        assert max(right(norm, "calibrated", "old_head")) < 2, "100 classes"
        for affine in ("fresh", "kept"):
            assert "(-" in difference(right(norm, "calibrated", "new_head"), right(norm, affine, "new_head"))
    old, new = (mean(right("GN1+WS", "calibrated", head)) for head in ("old_head", "new_head"))
    said = f"the old head had {old:.1f} % right, which is chance, and a new one {new:.1f} %,"
    assert f"Of MobileNetV2 under `GN1+WS` {said}" in prose("docs/from-batch-norm.md")


def test_what_fine_tuning_makes_of_them():
    """Each norm at the learning rate with its best mean."""
    found = {}
    for row in measured("finetune_caltech101"):
        if row["seed"] in (0, 1, 2):
            found.setdefault((row["norm"], row["affine"], row["lr"]), []).append(row["accuracy"])
    assert {len(accuracies) for accuracies in found.values()} == {3}
    best = {}
    for (norm, affine, _), accuracies in found.items():
        best[norm, affine] = max(best.get((norm, affine), 0), mean(accuracies))
    frozen, gn1, gn16 = best["FrozenBN", "trained"], best["GN1", "calibrated"], best["GN/16", "calibrated"]
    fresh = max(accuracy for (_, affine), accuracy in best.items() if affine == "fresh")
    page, readme = map(prose, ("docs/from-batch-norm.md", "README.md"))
    assert (
        f"had {gn1:.1f} % right after calibration and two epochs of fine-tuning on Caltech-101 with `GN1`, and "
        f"{gn16:.1f} % with `GN/16`, at the best of three learning rates, where FrozenBN had {frozen:.1f} %." in page
    )
    assert f"With weight 1 and bias 0 no group norm had more than {fresh:.1f} %" in page
    assert f"batch norm with statistics over two images had {best['BN', 'trained']:.1f} %." in page
    assert f"after two epochs it has {frozen:.1f} %, `GN1` {gn1:.1f}, which is within seed noise (the 95 % " in readme
    (missed,) = re.findall(r"missed by ([\d.]+) points in the mean under GN1", Path("docs/results.md").read_text())
    assert missed == f"{frozen - 0.5 - gn1:.1f}"


def test_detectors_from_pretrained_weights():
    ahead = {}
    for bed, metric in (("camvid", "mIoU"), ("bccd", "AP")):
        loaded, calibrated = (
            {row["norm"]: row["values"] for row in measured(f"{bed}_{name}") if row["metric"] == metric}
            for name in ("pretrained", "calibrated")
        )
        to_frozen = {norm: difference(values, loaded["FrozenBN"]) for norm, values in calibrated.items()}
        for norm in ("GN1", "GN/16"):
            assert "(-" in to_frozen[norm] and "to +" in to_frozen[norm], "within seed noise"
        assert "(-" in (of_loaded := difference(loaded["PGN"], loaded["FrozenBN"])) and "to +" in of_loaded
        assert "(+" in to_frozen["PGN"] and max(calibrated, key=lambda norm: mean(calibrated[norm])) == "PGN"
        for norm, values in calibrated.items():
            assert "(+" in difference(values, loaded[norm]), "calibration helps"
        number, interval = to_frozen["PGN"].replace("+", "").split(" ", 1)
        ahead[metric] = f"{number} {metric}", interval
    (camvid, its), (bccd, theirs) = ahead["mIoU"], ahead["AP"]
    said = f"by {camvid} on CamVid {its.replace('(', '(95 % interval ')} and by {bccd} on BCCD {theirs}"
    assert said in prose("docs/from-batch-norm.md")
    assert f"ahead of FrozenBN by {camvid} {its} and by {bccd} {theirs};" in prose("README.md")


def test_the_rate_that_was_tried_later():
    bccd = {row["learning_rate"]: row["value"] for row in measured("mobilenet_recipe") if row["bed"].startswith("BCCD")}
    assert f"With the latter FrozenBN had {bccd[0.018] - bccd[0.01]:.1f} AP more" in prose("docs/results.md")


def test_the_norm_table_of_the_readme():
    """Its rows are those that norm_table prints for the config that it names."""
    norms = [row for row in norm_table(build_on_meta(load_config("configs/faster_rcnn_pgn_ws.yaml"))) if row.num_groups]
    count = f"a single group in {sum(row.num_groups == 1 for row in norms)} of the {len(norms)} norms of Faster R-CNN"
    assert f"{count} R-50-FPN with a box head of 4 convolutions" in Path("README.md").read_text()
    (shown,) = re.findall(r"^```text\n(.*?)^```", Path("README.md").read_text(), re.DOTALL | re.MULTILINE)
    table = {row.name: row for row in norm_table(build_on_meta(load_config("configs/quick/pfpn_gn.yaml")))}
    for line in shown.splitlines()[1:]:
        name, *cells = line.split()
        row = table[name]
        found = [row.norm, row.n_in, row.n_out, row.num_groups, row.n_out // row.num_groups]
        assert cells == [*map(str, found)]
