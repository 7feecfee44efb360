"""What a comparison would run and how long it would take, measured by a few iterations under each norm."""

import copy
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from gng_d2.errors import InputError
from gng_d2.job.build import bind_remaining_norms, build
from gng_d2.job.weight_files import save_weight_file

from .comparison import Comparison, Run
from .intervals import half_interval
from .metrics import read_metrics
from .processes import Process
from .rows import markdown, norm_in_text

TIMED = 25  # iterations in a round
ROUNDS = 4
WATCHED = 20  # seconds after which an evaluation is stopped


def plan(comparison: Comparison, parallel: int = 1) -> str:
    """A text that says which runs are left, how long an iteration takes under each norm, and how long all that is left
    will take, evaluations included."""
    solver, runs = comparison.cfg.SOLVER, comparison.runs
    times, failures = _time_in_turn(comparison)
    try:
        evaluation = time_evaluation(comparison)
    except InputError as error:
        evaluation, failures["evaluation"] = 0.0, str(error)
    lines, hours, first = [], 0.0, norm_in_text(next(iter(times), "-"))
    for norm, compared in compare_times(times).items():
        left = sum(solver.MAX_ITER - comparison.iterations_done(run) for run in runs if run.norm == norm)
        hours += compared.mean * left / 3600
        lines.append([norm_in_text(norm), left, comparison.facts[norm].groups, *compared.cells()])
    for norm in comparison.norms:
        if norm in failures:
            lines.append([norm_in_text(norm), None, None, f"fails: {failures[norm]}", None])
    evaluations = sum(_evaluations_left(comparison, run) for run in runs)
    evaluation_hours = evaluations * evaluation / 3600
    all_hours = hours + evaluation_hours
    return "\n".join(
        [
            f"{comparison.cfg.MODEL.META_ARCHITECTURE}, {' '.join(comparison.keys)} varied: {len(runs)} runs of "
            f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images in {comparison.world_size} "
            f"process{'es' * (comparison.world_size > 1)}",
            markdown(lines, ["norm", "iterations left", "layers x groups", "s/iteration", f"to {first}"]),
            f"s/iteration is the mean of {ROUNDS} rounds (fastest to slowest), in which the norms take turns. The last "
            f"column is the mean of the rounds' ratios to {first} with its 95 % interval. If the interval "
            f"contains 1, the two norms cannot be told apart.",
            *([f"evaluation fails: {failures['evaluation']}"] if "evaluation" in failures else []),
            f"{all_hours:.2g} hours on {comparison.machine()}: {hours:.2g} of training, {evaluation_hours:.2g} of "
            f"{evaluations} evaluations of {evaluation:.2g} s (without their last step, which computes the scores)"
            + f"; {all_hours / parallel:.2g} where {parallel} runs at a time are as fast as one"
            * (parallel > 1),
        ]
    )


def _time_in_turn(comparison):
    """The seconds per iteration of each round by norm, and by norm why it failed. Each round has another order."""
    times: dict[str, list[float]] = {norm: [] for norm in comparison.norms}
    failures: dict[str, str] = {}
    with tqdm(total=ROUNDS * len(times), desc="timing a few iterations", unit="job") as bar:
        for number in range(ROUNDS):
            for norm in rotated(comparison.norms, number):
                if norm not in failures:
                    try:
                        times[norm].append(time_iteration(comparison, norm))
                    except InputError as error:
                        failures[norm] = str(error)
                bar.update()
    return {norm: seconds for norm, seconds in times.items() if norm not in failures}, failures


def rotated(norms: Sequence[str], number: int) -> list[str]:
    """``norms`` in another order for each ``number``: it begins with another norm each time, and for odd numbers the
    rest is reversed. So no norm is always the first, and none always follows the same one."""
    start = number % len(norms)
    first, *others = [*norms[start:], *norms[:start]]
    return [first, *others[::-1]] if number % 2 else [first, *others]


@dataclass(frozen=True)
class NormTimes:
    """Seconds per iteration under a norm."""

    seconds: list[float]  # of each round
    ratio: float | None = None  # to the first norm in the same round, as a geometric mean over the rounds
    low: float | None = None  # the 95 % interval of the ratio
    high: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    def cells(self) -> list[str]:
        time = f"{self.mean:.3f} ({min(self.seconds):.3f} to {max(self.seconds):.3f})"
        if self.ratio is None:
            return [time, "-"]
        interval = f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"
        return [time, interval + ", not told apart" * (self.low <= 1 <= self.high)]


def compare_times(times: dict[str, list[float]]) -> dict[str, NormTimes]:
    """Compare each norm with the first one in the same round, where what slows the machine down slows both.

    Args:
        times: by norm, the seconds per iteration of each round; two rounds or more.
    """
    compared: dict[str, NormTimes] = {}
    for norm, seconds in times.items():
        if not compared:
            first = seconds
            compared[norm] = NormTimes(seconds)
            continue
        logs = [math.log(here / there) for here, there in zip(seconds, first)]
        mean = statistics.fmean(logs)
        half = half_interval(logs)
        compared[norm] = NormTimes(seconds, *map(math.exp, (mean, mean - half, mean + half)))
    return compared


def time_iteration(comparison: Comparison, norm: str) -> float:
    """Run a few iterations under ``norm``, in a folder that is deleted again, and return the seconds per iteration that
    Detectron2 records last, a median.

    Raises:
        InputError: the job failed; says why.
    """
    scale = comparison.world_size / (comparison.norm_cfg(norm).SOLVER.REFERENCE_WORLD_SIZE or comparison.world_size)
    overrides = [
        *("SOLVER.MAX_ITER", str(math.ceil(TIMED * scale)), "DATASETS.TEST", "()"),
        # so small a step that no loss explodes
        *("SOLVER.BASE_LR", "1e-10", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "()"),
        *("SOLVER.WARMUP_ITERS", "0"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(norm, comparison.seeds[0], folder)
        with Process([*comparison.command(run), *overrides], run.path("output.txt")) as process:
            process.wait()
            if process.failure():
                raise InputError(process.failure())
        return [record["time"] for record in read_metrics(run.path("metrics.json")) if "time" in record][-1]


def time_evaluation(comparison: Comparison) -> float:
    """The seconds that an evaluation of the first norm's untrained model takes for the images, without computing the
    scores. A long evaluation is stopped after :data:`WATCHED` seconds, and its pace so far is taken.

    Raises:
        InputError: the job failed; says why.
    """
    if not comparison.cfg.DATASETS.TEST:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        run = Run(comparison.norms[0], comparison.seeds[0], folder)
        weights = run.path("untrained.pth")
        model = bind_remaining_norms(build(comparison.norm_cfg(run.norm), "cpu"))
        save_weight_file(weights, {"model": model.state_dict()})
        comparison = copy.copy(comparison)
        comparison.calibrate_norms = 0  # which --eval-only refuses
        command = [*comparison.command(run), "MODEL.WEIGHTS", weights]
        command.insert(command.index("--resume"), "--eval-only")
        with Process(command, os.path.join(folder, "output.txt")) as process:
            began = None
            while process.poll() is None:
                time.sleep(0.5)
                began = began or (time.monotonic() if evaluation_seconds(process.printed()) else None)
                if began and time.monotonic() - began > WATCHED:
                    return evaluation_seconds(process.printed())
            if process.failure():
                raise InputError(process.failure())
            return evaluation_seconds(process.printed())


def evaluation_seconds(printed: str) -> float:
    """The seconds for all images of all datasets, as far as Detectron2's evaluation has printed them; 0 at first."""
    done = [_seconds(clock) for clock in re.findall(r"Total inference time: ([\d:.]+)", printed)]
    going_on = re.findall(
        r"Inference done \d+/(\d+)\..*Total: ([\d.]+) s/iter", printed.rpartition("Total inference")[2]
    )
    return sum(done) + (int(going_on[-1][0]) * float(going_on[-1][1]) if going_on else 0.0)


def _seconds(clock):
    hours, minutes, seconds = map(float, clock.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def _evaluations_left(comparison, run):
    """How many evaluations are left: Detectron2 evaluates every EVAL_PERIOD iterations and after the last one."""
    last, period = comparison.cfg.SOLVER.MAX_ITER, comparison.cfg.TEST.EVAL_PERIOD
    done = comparison.iterations_done(run)
    if not comparison.cfg.DATASETS.TEST or run.recorded_state().status == "finished":
        return 0
    return 1 + ((last - 1) // period - min(done, last - 1) // period if period > 0 else 0)
