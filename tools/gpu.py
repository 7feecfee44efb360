#!/usr/bin/env python3
"""Answer what is open about a GPU, in one command: do the kernels work there, how fast are they, what do they save.

    python3 tools/gpu.py                # nine minutes; `make gpu`, where the environment of this project is
    python3 tools/gpu.py --device cpu   # the same at the smallest sizes, to try it: its numbers say nothing

Needs PyTorch 2.4 or newer with Triton, NumPy, tabulate and tqdm; pytest for the tests; Detectron2 for training steps
and their memory. What is missing is named, and the other parts run. Each part is a process of its own with a share of
the time that is left, and writes its JSON as it goes, so that the same command goes on where it was: the tests run
again, measurements that are there are kept. After a change to the kernels, --anew measures all again.

The JSON is what tools/reproduce.py page reads. Ends with exit status 1 if a test fails or a part breaks.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

from command_line import run_tool, tool_parser

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Detectron2's models made small, for --device cpu
SMALL = (
    "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 "
    "MODEL.ROI_MASK_HEAD.CONV_DIM 32 MODEL.ROI_HEADS.NUM_CLASSES 5 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 "
    "MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.SEM_SEG_HEAD.CONVS_DIM 32"
)


@dataclass(frozen=True)
class Part:
    """An experiment of tools/reproduce.py."""

    experiment: str
    result: str  # name of its JSON file, before the device
    needs: tuple[str, ...]  # modules
    share: float  # of the time that is left
    on_cuda: str  # its arguments
    on_cpu: str


PARTS = (
    Part("kernel-tests", "kernel_tests", ("pytest",), 0.3, "", "--quick"),
    Part(
        "norm-cost", "benchmark_norm", (), 0.5,
        "--resume --images 2 1 --seconds 0.1 --dtype float32 float16 bfloat16 --layout contiguous channels_last "
        "--implementations our_kernels frozen_bn --after nothing relu add_relu",
        "--resume --images 2 --seconds 0.001 --size 32 64 --implementations our_kernels frozen_bn "
        "--after nothing relu",
    ),
    Part(
        "step-cost", "benchmark_train", ("detectron2",), 0.7,
        "--resume --images 2 1 --seconds 3",
        f"--models pfpn --resume --images 1 --seconds 0.01 --size 64 96 {SMALL}",
    ),
    Part(
        "memory", "memory", ("detectron2",), 1.0,
        "--resume --seconds 2",
        f"--models pfpn --resume --size 64 96 {SMALL}",
    ),
)  # fmt: skip


def missing(modules):
    return [name for name in modules if find_spec(name) is None]


def run(part, path, device, seconds):
    """What became of it: "finished", "failed", or "cut off". It is interrupted when its time is over."""
    arguments = (part.on_cuda if device == "cuda" else part.on_cpu).split()
    tool = os.path.join(ROOT, "tools", "reproduce.py")
    command = [sys.executable, "-W", "ignore", tool, part.experiment, "--device", device, "--json", path, *arguments]
    path_of_imports = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path_of_imports, "GNG_D2_KERNELS": "cuda"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment.pop("TRITON_INTERPRET", None)
    job = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return "failed" if job.wait(seconds) else "finished"
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            job.wait(5)
        return "cut off"
    finally:
        job.kill()
        job.wait()


def report(paths):
    """The goals, and the rule, from the JSON files that are there."""
    from study import goals, rule
    from study.norm_cost import NormCostRow
    from study.rows import read_rows

    norms = read_rows(paths["norm-cost"], NormCostRow) if os.path.exists(paths["norm-cost"]) else []
    steps = []
    if os.path.exists(paths["step-cost"]):
        from study.step_cost import StepCostRow

        steps = read_rows(paths["step-cost"], StepCostRow)
    return "\n\n".join(
        [goals.table(goals.norm_goals(norms) + goals.fused_goals(norms) + goals.step_goals(steps)), rule.table(norms)]
    )


def main():
    parser = tool_parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long it may take; default: %(default)g")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="for the JSON files; default: docs/results, with --device cpu output/gpu",
    )
    parser.add_argument("--anew", action="store_true", help="measure what is measured again")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes

    lacking = missing(["torch", "numpy", "tabulate", "tqdm"])
    if lacking:
        sys.exit(f"error: {sys.executable} lacks {', '.join(lacking)}, which all of this needs")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: a CUDA GPU was not found by PyTorch. --device cpu tries the command at the smallest sizes")
    if args.device == "cuda" and missing(["triton"]):
        sys.exit("error: Triton is not installed, so only PyTorch's own ops could be measured")
    sys.path.insert(0, ROOT)  # gng_d2, where it is not installed
    from gng_d2.job.files import prepare_folder

    folder = args.output or os.path.join(ROOT, *(("docs", "results") if args.device == "cuda" else ("output", "gpu")))
    prepare_folder(folder)
    paths = {part.experiment: os.path.join(folder, f"{part.result}_{args.device}.json") for part in PARTS}
    if args.device == "cpu":
        print("--device cpu: tries the command; at these sizes its numbers say nothing of the goals")
    became = {}
    for part in PARTS:
        path, lacking = paths[part.experiment], missing(part.needs)
        if args.anew:
            with suppress(FileNotFoundError):
                os.remove(path)
        print(f"\n== {part.experiment}", flush=True)
        if lacking:
            became[part.experiment] = f"NOT RUN: needs {', '.join(lacking)}"
            continue
        seconds = part.share * (end - time.monotonic())
        became[part.experiment] = run(part, path, args.device, max(seconds, 0)) if seconds > 0 else "NOT RUN: no time"
        print(f"\n{report(paths)}", flush=True)
    print()
    for experiment, what in became.items():
        print(f"{experiment}: {what}{'; the same command goes on' if what in ('cut off', 'NOT RUN: no time') else ''}")
    print(f"JSON: {folder}")
    sys.exit("failed" in became.values())


if __name__ == "__main__":
    run_tool(main, if_stopped="the same command goes on where it was")
