"""Write docs/results.md from the measurements in docs/results.

The prose is in tools/study/page.md. A {{NAME}} in it is replaced by a section of SECTIONS, which is the table of
docs/results/NAME.json with its command and machine; by a table of COMPUTED, which is made from several such files; or
by a number of NUMBERS. To add a measurement, add its JSON file, a line in SECTIONS, and a heading with {{NAME}} in
page.md. The same tables are written into other pages of docs/, between their lines <!-- table of NAME --> and
<!-- end of table -->.
"""

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from gng_d2.job.files import atomic_open, prepare_outputs
from gng_d2.models.norm_table import norm_table

from . import (
    ROOT,
    classifier,
    collapse,
    finetune,
    goals,
    gradients,
    kernel_tests,
    memory,
    mlp,
    norm_cost,
    regret,
    report,
    retention,
    rule,
    step_cost,
    sweep,
    table1,
    table2,
    ws_effect,
)
from .intervals import mean_with_interval, number_of_seeds
from .paper import TABLE_5, TABLE_6
from .rows import markdown, read_rows

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.md")
DOCS = os.path.join(ROOT, "docs")


@dataclass(frozen=True)
class Section:
    """A table of the page, made from the rows in docs/results/NAME.json. The same NAME stands in its fields."""

    row_type: type
    table: Callable[[list], str]  # makes Markdown of the rows
    command: str  # the command that measured them, without "python tools/"
    pictures: tuple[str, ...] = ()  # file names in docs/results
    beside: tuple[str, ...] = ()  # the name of another comparison, and its norms that come first in this one's table

    def text(self, name: str, results: str, title: str) -> str:
        """The text below the heading ``title``."""
        path, command = os.path.join(results, f"{name}.json"), self.command.replace("NAME", name)
        if not os.path.exists(path):
            return f"Not measured. The command:\n\n    python tools/{command}"
        rows = read_rows(path, self.row_type)
        machines = ", ".join(dict.fromkeys(row.machine for row in rows))
        if self.beside:
            name_of_other, *norms = self.beside
            others = read_rows(os.path.join(results, f"{name_of_other}.json"), self.row_type)
            seeds = {seed for row in rows for seed in row.seeds}
            rows = report.together([*(row for row in others if row.norm in norms), *rows], seeds)
        made = f"`python tools/{command}`, on {machines} ([raw](results/{name}.json))."
        pictures = [f"![{title}](results/{picture.replace('NAME', name)})" for picture in self.pictures]
        return "\n\n".join([self.table(rows), made, *pictures])


@dataclass(frozen=True)
class RecipeRow:
    """A short run that helped to fix the recipe of a bed in configs/study."""

    bed: str
    norm: str
    learning_rate: float
    iterations: int
    seed: int
    images: str  # the images on which it was evaluated
    metric: str
    value: float
    machine: str


def _recipe_table(rows):
    keys = ("norm", "learning_rate", "iterations", "seed", "images", "metric")
    lines = [[row.bed, *(getattr(row, key) for key in keys), f"{row.value:.1f}"] for row in rows]
    return markdown(lines, [key.replace("_", " ") for key in ("data", *keys, "value")], "g")


def _experiment(module, row_type, command):
    pictures = ("NAME.png",) if "--plot" in command else ()
    return Section(row_type, module.table, f"reproduce.py {command}", pictures)


def _comparison(arguments, *pictures, beside=()):
    return Section(report.ComparisonRow, report.table, f"compare.py {arguments}", pictures, beside)


def _norms_on_a_gpu(rows):
    return "\n\n".join(
        [norm_cost.table(rows), goals.table(goals.norm_goals(rows) + goals.fused_goals(rows)), rule.table(rows)]
    )


def _fused_norms(rows):
    return "\n\n".join([norm_cost.table(rows), goals.table(goals.fused_goals(rows)), goals.what_bounds(rows)])


def _learned_norm(rows):
    return "\n\n".join([norm_cost.table(rows), goals.table(goals.learned_goals(rows))])


def _steps_on_a_cpu(rows):
    return "\n\n".join([step_cost.table(rows), goals.table([goals.recomputed_step(rows)])])


def _steps_on_a_gpu(rows):
    return "\n\n".join([step_cost.table(rows), goals.table(goals.step_goals(rows))])


# NAME is the section's
_JSON = "--json docs/results/NAME.json"
_PLOT = f"{_JSON} --plot docs/results/NAME.png"
_THREE = "--norms GN GN1 PGN --seeds 0 1 2"
_SHAPES = "--norms GN GN1 PGN GN/1 --seeds 0 1 2 --output DIR"
_BEDS = "--import configs/study/bccd_camvid.py"
_MIXTURES = f"{_BEDS} tools/study/mixture_norm.py"
_CAMVID = "--config-file configs/study/semantic_fpn_camvid.yaml --norm-keys MODEL.SEM_SEG_HEAD.NORM"
_BCCD = "--config-file configs/study/faster_rcnn_bccd.yaml"
_WITHOUT_WS = "MODEL.RESNETS.NORM GN MODEL.FPN.NORM GN MODEL.ROI_BOX_HEAD.NORM GN"
_PRETRAINED = "--data caltech101 --weights mobilenet_v2-b0353104.pth"
_DETECTORS = f"{_BEDS} configs/study/mobilenet_v2_fpn.py"
_DETECTOR_WEIGHTS = "MODEL.WEIGHTS 'mobilenet_v2-b0353104.pth?matching_heuristics=True'"
_COCO_80 = (
    "MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0 DATASETS.TEST '()' INPUT.MIN_SIZE_TRAIN '(128,)' "
    "INPUT.MAX_SIZE_TRAIN 213 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.01 SOLVER.WARMUP_ITERS 20 SOLVER.STEPS '()' "
    "SOLVER.MAX_ITER 80 SOLVER.CHECKPOINT_PERIOD 1000 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 "
    "MODEL.RPN.POST_NMS_TOPK_TRAIN 100 DATALOADER.NUM_WORKERS 0"
)


def _from_weights(config, norms, beside_frozen_bn_of=""):
    other, flag = beside_frozen_bn_of, "--calibrate-norms 64 " * bool(beside_frozen_bn_of)
    return _comparison(
        f"{_DETECTORS} --config-file configs/study/{config} --norm-keys MODEL.RESNETS.NORM --norms {norms} "
        f"--seeds 0 1 2 --output DIR {flag}{_DETECTOR_WEIGHTS}",
        beside=(other, "FrozenBN") if other else (),
    )


SECTIONS = {
    "theory_table1": _experiment(table1, table1.Table1Row, f"table1 {_JSON}"),
    "theory_table2": _experiment(table2, table2.Table2Row, f"table2 {_JSON}"),
    "theory_sweep": _experiment(sweep, sweep.SweepRow, f"sweep {_PLOT}"),
    "isometry_r50": _experiment(
        gradients,
        gradients.GradientRow,
        f"gradients --config-file configs/faster_rcnn_gn_ws.yaml {_PLOT} MODEL.WEIGHTS '' "
        "MODEL.BACKBONE.FREEZE_AT 0 INPUT.MIN_SIZE_TRAIN '(320,)'",
    ),
    "mlp_mnist": _experiment(mlp, mlp.MLPRow, f"table3 --data ROOT --processes 2 {_PLOT}"),
    "classifier_caltech101": _experiment(classifier, classifier.ClassifierRow, f"table4 --data caltech101 {_JSON}"),
    "retention_caltech101": _experiment(
        retention,
        retention.RetentionRow,
        f"retention {_PRETRAINED} --images 4 16 256 {_PLOT}",
    ),
    "retention_ws_caltech101": _experiment(
        retention,
        retention.RetentionRow,
        f"retention {_PRETRAINED} --norms GN1+WS GN/16+WS {_JSON}",
    ),
    "finetune_caltech101": _experiment(finetune, finetune.FinetuneRow, f"finetune {_PRETRAINED} {_JSON}"),
    "mobilenet_recipe": Section(
        RecipeRow,
        _recipe_table,
        f"train_net.py {_DETECTORS} --config-file configs/study/CONFIG.yaml SEED 100 MODEL.RESNETS.NORM FrozenBN "
        f"SOLVER.BASE_LR RATE DATASETS.TEST \"('IMAGES',)\" {_DETECTOR_WEIGHTS}",
    ),
    "camvid_pretrained": _from_weights("semantic_fpn_mobilenet_camvid.yaml", "FrozenBN GN1 GN/16 PGN"),
    "camvid_calibrated": _from_weights("semantic_fpn_mobilenet_camvid.yaml", "GN1 GN/16 PGN", "camvid_pretrained"),
    "bccd_pretrained": _from_weights("faster_rcnn_mobilenet_bccd.yaml", "FrozenBN GN1 GN/16 PGN"),
    "bccd_calibrated": _from_weights("faster_rcnn_mobilenet_bccd.yaml", "GN1 GN/16 PGN", "bccd_pretrained"),
    "table5": _comparison(f"{_THREE} --config-file configs/pfpn_gn.yaml --output output/table5 --num-gpus 8"),
    "quick_pfpn": _comparison(
        f"{_THREE} --config-file configs/quick/pfpn_gn.yaml --norm-keys MODEL.SEM_SEG_HEAD.NORM --output DIR "
        "TEST.EVAL_PERIOD 250",
        "NAME.png",
    ),
    "table6": _comparison(f"{_THREE} --config-file configs/faster_rcnn_gn_ws.yaml --output output/table6 --num-gpus 8"),
    "quick_faster_rcnn": _comparison(
        f"{_THREE} --config-file configs/quick/faster_rcnn_gn_ws.yaml --output DIR TEST.EVAL_PERIOD 250",
        "NAME.png",
    ),
    "coco80_faster_rcnn": _comparison(
        f"--norms GN GN1 PGN --seeds 0 --config-file configs/faster_rcnn_gn_ws.yaml --output DIR {_COCO_80}",
        "NAME.png",
    ),
    "camvid_semantic_fpn": _comparison(
        f"{_BEDS} {_CAMVID} --norms GN GN1 PGN GN/16 GN/1 --seeds 0 1 2 3 4 --output DIR",
        "NAME_channels.png",
        "NAME_curves.png",
    ),
    "bccd_faster_rcnn": _comparison(
        f"{_BEDS} {_BCCD} --norms GN GN1 PGN GN/16 GN/1 --seeds 0 1 2 --output DIR",
        "NAME_channels.png",
        "NAME_curves.png",
    ),
    "camvid_ws": _comparison(
        f"{_BEDS} {_CAMVID} --norms GN+WS GN1+WS GN/1+WS --seeds 0 1 2 --output DIR", "NAME_curves.png"
    ),
    "camvid_collapse": _experiment(collapse, collapse.CollapseRow, f"collapse {_BEDS} --runs PLAIN_DIR WS_DIR {_PLOT}"),
    "camvid_mixtures": _comparison(
        f"{_MIXTURES} {_CAMVID} --norms LGN MIX-uniform MIX-fixed MIX-fixed-last MIX-shared "
        "--seeds 0 1 2 3 4 --output DIR",
        "NAME_curves.png",
        beside=("camvid_semantic_fpn", "GN", "GN/1"),
    ),
    "camvid_learned": Section(
        collapse.CollapseRow,
        collapse.mixture_table,
        f"reproduce.py collapse {_MIXTURES} --runs DIR {_JSON}",
    ),
    "camvid_long": _comparison(
        f"{_BEDS} {_CAMVID} --norms GN GN1 GN/1 LGN --seeds 0 1 2 --output DIR SOLVER.MAX_ITER 3600",
        "NAME_curves.png",
    ),
    "bccd_plain": _comparison(
        f"{_MIXTURES} {_BCCD} --norms GN GN1 GN/1 LGN MIX-shared --seeds 0 1 2 3 4 --output DIR {_WITHOUT_WS}",
        "NAME_curves.png",
    ),
    "bccd_collapse": _experiment(collapse, collapse.CollapseRow, f"collapse {_MIXTURES} --runs DIR {_PLOT}"),
    "bccd_mixtures": _comparison(
        f"{_MIXTURES} {_BCCD} --norms MIX-fixed MIX-slow --seeds 0 1 2 --output DIR",
        "NAME_curves.png",
        beside=("bccd_faster_rcnn", "GN", "GN/1"),
    ),
    "bccd_box_head": _comparison(
        f"{_BEDS} {_BCCD} --norm-keys MODEL.ROI_BOX_HEAD.NORM --norms LGN --seeds 0 1 2 --output DIR",
        "NAME_curves.png",
        beside=("bccd_faster_rcnn", "GN"),
    ),
    "bccd_camvid_recipe": Section(
        RecipeRow,
        _recipe_table,
        f"train_net.py {_BEDS} --config-file configs/study/CONFIG.yaml SEED 100 SOLVER.BASE_LR RATE "
        "SOLVER.MAX_ITER ITERATIONS DATASETS.TEST \"('IMAGES',)\"",
    ),
    "pfpn_shapes": _comparison(
        f"{_SHAPES} --config-file configs/study/pfpn_shapes.yaml --norm-keys MODEL.SEM_SEG_HEAD.NORM"
    ),
    "faster_rcnn_shapes": _comparison(f"{_SHAPES} --config-file configs/study/faster_rcnn_shapes.yaml"),
    "benchmark_norm_cpu": _experiment(norm_cost, norm_cost.NormCostRow, f"norm-cost {_JSON}"),
    "fused_norm_cpu": Section(
        norm_cost.NormCostRow,
        _fused_norms,
        f"reproduce.py norm-cost --after relu add_relu --implementations frozen_bn --seconds 0.15 {_JSON}",
    ),
    "learned_norm_cpu": Section(
        norm_cost.NormCostRow,
        _learned_norm,
        f"reproduce.py norm-cost --implementations learned --seconds 0.15 {_JSON}",
    ),
    "kernel_tests_cuda": Section(kernel_tests.KernelTestRow, kernel_tests.table, "gpu.py"),
    "benchmark_norm_cuda": Section(norm_cost.NormCostRow, _norms_on_a_gpu, "gpu.py"),
    "benchmark_train_cpu": Section(
        step_cost.StepCostRow, _steps_on_a_cpu, f"reproduce.py step-cost --size 480 736 {_JSON}"
    ),
    "benchmark_train_cuda": Section(step_cost.StepCostRow, _steps_on_a_gpu, "gpu.py"),
    "memory_cpu": _experiment(memory, memory.MemoryRow, f"memory {_JSON}"),
    "memory_cuda": Section(memory.MemoryRow, memory.table, "gpu.py"),
}


def _regrets(results):
    camvid = regret.read_values(results, ("camvid_semantic_fpn", "camvid_mixtures"), "mIoU")
    bccd = regret.read_values(results, ("bccd_faster_rcnn", "bccd_mixtures"), "AP")
    plain = regret.read_values(results, ["bccd_plain"], "AP")  # without weight standardization, as CamVid's head
    bccd |= {norm: values for norm, values in plain.items() if norm in ("LGN", "MIX-shared")}
    if not camvid or not bccd:
        return "Not measured, because it needs the comparisons on both sets."
    return regret.table({"CamVid": camvid, "BCCD": bccd})


def _ws_effect(results):
    def values(names, metric):
        return [regret.read_values(results, [name], metric) for name in names]

    camvid = values(("camvid_semantic_fpn", "camvid_ws"), "mIoU")
    bccd = values(("bccd_plain", "bccd_faster_rcnn"), "AP")
    return ws_effect.table({"CamVid": camvid, "BCCD": bccd})


def _detectors_from_weights(results):
    columns = {}
    for bed, metric in (("CamVid", "mIoU"), ("BCCD", "AP")):
        for affine, name in (("as loaded", "pretrained"), ("calibrated", "calibrated")):
            values = regret.read_values(results, [f"{bed.lower()}_{name}"], metric)
            columns[f"{bed} {metric}, {affine}"] = {norm: _with_seeds([*of.values()]) for norm, of in values.items()}
    norms = dict.fromkeys(norm for column in columns.values() for norm in column)
    lines = [[norm, *(column.get(norm, "") for column in columns.values())] for norm in norms]
    return markdown(lines, ["norm of the backbone", *columns])


def _with_seeds(values):
    return f"{mean_with_interval(values)} ({number_of_seeds(len(values))})" if values else "-"


# tables made from several files: functions of the folder that has the files
COMPUTED = {"regrets": _regrets, "ws_effect": _ws_effect, "detectors_from_weights": _detectors_from_weights}


def _config(name):
    return load_config(os.path.join(ROOT, "configs", name))


def _one_group(name, part=""):
    """How many norms of a config's model have one group, for instance "3 of 7"."""
    groups = [row.num_groups for row in norm_table(build_on_meta(_config(name))) if row.name.startswith(part)]
    return f"{groups.count(1)} of {len(groups)}"


def _schedule(name):
    solver = _config(name).SOLVER
    return f"{solver.MAX_ITER} steps of {solver.IMS_PER_BATCH} images"


def _paper_table(table):
    metrics = list(next(iter(table.values())))
    return markdown([[name, *values.values()] for name, values in table.items()], ["config", *metrics], ".2f")


NUMBERS = {
    "quick_schedule": lambda: _schedule("quick/pfpn_gn.yaml"),
    "quick_faster_rcnn_one_group": lambda: _one_group("quick/faster_rcnn_pgn_ws.yaml"),
    "quick_head_width": lambda: _config("quick/pfpn_gn.yaml").MODEL.SEM_SEG_HEAD.CONVS_DIM,
    "paper_head_width": lambda: _config("pfpn_gn.yaml").MODEL.SEM_SEG_HEAD.CONVS_DIM,
    "paper_head_group": lambda: _config("pfpn_gn.yaml").MODEL.SEM_SEG_HEAD.CONVS_DIM // 32,
    "camvid_one_group": lambda: _one_group("pfpn_pgn.yaml", "sem_seg_head."),  # the bed's head is the same
    "camvid_head_group": lambda: _config("study/semantic_fpn_camvid.yaml").MODEL.SEM_SEG_HEAD.CONVS_DIM // 32,
    "camvid_rate": lambda: _config("study/semantic_fpn_camvid.yaml").SOLVER.BASE_LR,
    "bccd_rate": lambda: _config("study/faster_rcnn_bccd.yaml").SOLVER.BASE_LR,
    "paper_table_4": classifier.paper_table,
    "paper_table_5": lambda: _paper_table(TABLE_5),
    "paper_table_6": lambda: _paper_table(TABLE_6),
}


def page(docs: str = DOCS) -> str:
    """The text of the page, with the measurements in ``docs``/results.

    Raises:
        InputError: a file is damaged, or page.md has a {{NAME}} that is not known.
    """

    def fill(match):
        name = match[1]
        if name in SECTIONS:
            title = re.findall(r"^##+ (.*)$", match.string[: match.start()], re.MULTILINE)[-1]
            return SECTIONS[name].text(name, os.path.join(docs, "results"), title)
        if name in COMPUTED:
            return COMPUTED[name](os.path.join(docs, "results"))
        if name not in NUMBERS:
            raise InputError(f"{TEMPLATE}: {{{{{name}}}}} is in none of SECTIONS, COMPUTED and NUMBERS of page.py")
        return str(NUMBERS[name]())

    with open(TEMPLATE, encoding="utf-8") as file:
        return re.sub(r"\{\{(\w+)\}\}", fill, file.read())


def with_tables(text: str, docs: str = DOCS) -> str:
    """``text`` with the tables of ``docs``/results between its lines ``<!-- table of NAME -->`` and
    ``<!-- end of table -->``."""

    def table(name):
        results = os.path.join(docs, "results")
        if name in COMPUTED:
            return COMPUTED[name](results)
        section, path = SECTIONS[name], os.path.join(results, f"{name}.json")
        return section.table(read_rows(path, section.row_type)) if os.path.exists(path) else "Not measured."

    def fill(match):
        return f"{match[1]}\n\n{table(match[2])}\n\n{match[3]}"

    return re.sub(r"(<!-- table of (\w+) -->).*?(<!-- end of table -->)", fill, text, flags=re.DOTALL)


def add_arguments(parser) -> None:
    parser.add_argument(
        "--output", default=os.path.join(DOCS, "results.md"), metavar="FILE.md", help="default: docs/results.md"
    )


def main(args) -> None:
    prepare_outputs(args.output)
    text = page()
    with atomic_open(args.output) as file:
        file.write(text)
    for path in glob.glob(os.path.join(os.path.dirname(args.output) or ".", "*.md")):
        with open(path, encoding="utf-8") as file:
            before = file.read()
        after = with_tables(before)
        if after != before:
            with atomic_open(path) as file:
                file.write(after)
    print(f"{args.output}: {text.count('Not measured. ')} of {len(SECTIONS)} sections are not measured")
