"""What a plan says: the times of norms that take turns, whether they differ, and how long evaluations take."""

import os

import pytest
from detectron2.engine import DefaultTrainer

from gng_d2.errors import InputError
from gng_d2.job.config import load_config
from study import plan as planning
from study.comparison import RunState
from study.plan import compare_times, evaluation_seconds, plan, rotated, time_iteration
from study.processes import Process


@pytest.mark.parametrize("processes", [1, 2])
def test_a_plan_times_few_iterations_of_a_scaled_schedule_too(processes, job, monkeypatch, small):
    commands = []
    monkeypatch.setattr(planning, "Process", lambda command, *rest: commands.append(command) or Process(command, *rest))
    overrides = ["SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.MAX_ITER", "9000"]
    comparison = small(overrides=overrides, num_gpus=processes)
    assert time_iteration(comparison, "PGN") == 0.25
    cfg = load_config(comparison.config_file, commands[0][commands[0].index(overrides[0]) :])
    assert 20 < DefaultTrainer.auto_scale_workers(cfg, processes).SOLVER.MAX_ITER < 30
    with pytest.raises(InputError, match="ValueError: it does not divide"):
        time_iteration(comparison, "GN3")


def test_each_norm_comes_first_and_none_always_after_the_same():
    norms = ["GN", "GN1", "PGN"]
    orders = [rotated(norms, number) for number in range(planning.ROUNDS)]
    assert {order[0] for order in orders} == {*norms} and all(sorted(order) == norms for order in orders)
    for norm in norms:
        before = [order[order.index(norm) - 1] for order in orders if order[0] != norm]
        assert len({*before}) > 1 or len(before) == 1


def test_times_that_rise_together_differ_and_times_that_cross_do_not():
    """The ratio of PGN is 1.10 in each round, though the machine gets three times slower; GN1's is 1.5 and 1/1.5."""
    first = [1.0, 1.5, 3.0, 2.0]
    compared = compare_times({"GN": first, "PGN": [1.1 * t for t in first], "GN1": [1.5, 1.0, 4.5, 4 / 3]})
    assert compared["GN"].cells() == ["1.875 (1.000 to 3.000)", "-"]
    assert compared["PGN"].cells() == ["2.062 (1.100 to 3.300)", "1.10 (1.10 to 1.10)"]
    # logs of +-0.405: standard deviation 0.468, error 0.234, and Student's t with 3 degrees of freedom 3.182
    assert compared["GN1"].low == pytest.approx(0.475, abs=1e-3) and compared["GN1"].high == pytest.approx(
        2.106, abs=1e-3
    )
    assert compared["GN1"].cells()[1].endswith("not told apart")


GOING_ON = "Inference done 11/50. Dataloading: 0.01 s/iter. Eval: 0.1 s/iter. Total: 0.3 s/iter. ETA=0:00:01\n"
ENDED = "Total inference time: 0:01:05.500000 (0.1 s / iter per device, on 1 devices)\n"
ENDED += "Total inference pure compute time: 0:00:59 (0.1 s / iter per device, on 1 devices)\n"


@pytest.mark.parametrize(
    "printed, seconds",
    [
        ("", 0),
        (GOING_ON, 15),
        (GOING_ON + GOING_ON.replace("0.3 s/iter. ETA", "0.2 s/iter. ETA"), 10),
        (GOING_ON + ENDED, 65.5),
        (GOING_ON + ENDED + GOING_ON, 80.5),  # of a second dataset
    ],
)
def test_an_evaluation_is_timed_by_what_it_prints(printed, seconds):
    assert evaluation_seconds(printed) == pytest.approx(seconds)


@pytest.fixture
def timed(monkeypatch):
    """An iteration takes 2 s under GN and 4 s under PGN in every round, and an evaluation takes 36 s."""
    monkeypatch.setattr(planning, "time_iteration", lambda comparison, norm: {"GN": 2.0, "PGN": 4.0}[norm])
    monkeypatch.setattr(planning, "time_evaluation", lambda comparison: 36.0)


def test_what_is_left_is_added_up(timed, small):
    comparison = small(overrides=["SOLVER.MAX_ITER", "900", "TEST.EVAL_PERIOD", "300"])
    comparison.claim_output()
    text = plan(comparison, parallel=2)
    # two seeds of 900 iterations: 1800 x 2 s and 1800 x 4 s; four runs evaluated at 300, 600 and 900
    assert "3 of training, 0.12 of 12 evaluations of 36 s" in text and "3.1 hours on " in text
    assert "1.6 where 2 runs at a time are as fast as one" in text
    run = comparison.runs[0]
    os.makedirs(run.folder)
    run.record(RunState("finished"))
    assert "2.5 of training, 0.09 of 9 evaluations" in plan(comparison)


def test_a_norm_that_fails_is_said_to(timed, small, monkeypatch):
    def fails(comparison, norm):
        if norm == "GN3":
            raise InputError("it does not divide")
        return 1.0

    monkeypatch.setattr(planning, "time_iteration", fails)
    text = plan(small(["GN", "GN3", "PGN"], [0]))
    assert "fails: it does not divide" in text and "PGN" in text


def test_without_an_evaluation_none_is_counted(timed, small):
    text = plan(small(["GN"], [0], overrides=["SOLVER.MAX_ITER", "900", "DATASETS.TEST", "()"]))
    assert "of 0 evaluations" in text


def test_an_evaluation_is_timed_without_calibration(small, monkeypatch):
    commands = []

    def failing(command, log):
        commands.append(command)
        raise InputError("not here")

    monkeypatch.setattr(planning, "Process", failing)
    with pytest.raises(InputError, match="not here"):
        planning.time_evaluation(small(["GN"], [0], calibrate_norms=3))
    assert "--eval-only" in commands[0] and "--calibrate-norms" not in commands[0]


@pytest.mark.slow
def test_a_real_plan(shapes, small, monkeypatch):
    import quick_models

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(planning, "ROUNDS", 1)
    monkeypatch.setattr(planning, "TIMED", 3)
    text = plan(small(["PGN"], [0], overrides=[*quick_models.TRAINING, "SOLVER.MAX_ITER", "9"]))
    assert "fails" not in text and "of 1 evaluations of" in text and "evaluations of 0 s" not in text, text
