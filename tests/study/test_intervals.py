import pytest

from study.intervals import half_interval, mean_with_interval, number_of_seeds


def test_an_interval_is_students():
    # t is 4.3027 for 2 degrees of freedom, the standard error sqrt(7 / 3)
    assert half_interval([1.0, 2.0, 6.0]) == pytest.approx(4.3027 * (7 / 3) ** 0.5, rel=1e-4)
    assert half_interval([1.0]) is None


def test_a_mean_is_written_with_its_interval():
    assert mean_with_interval([1.0, 2.0, 6.0]) == "3.0 ± 6.6"
    assert mean_with_interval([1.0, 2.0], sign="+") == "+1.5 ± 6.4"
    assert [mean_with_interval(values) for values in ([2.04], [], [1.0, None])] == ["2.0", "-", "-"]
    assert [number_of_seeds(count) for count in (1, 3)] == ["1 seed", "3 seeds"]
