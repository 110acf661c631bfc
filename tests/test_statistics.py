import math

import pytest

from evals.statistics import (
    mean_and_standard_error,
    proportion_standard_error,
    wilson_interval,
    win_rate,
)


def test_standard_error_of_a_share():
    # p = 80 / 100; sqrt(0.8 * 0.2 / 100) = sqrt(0.0016)
    assert proportion_standard_error(80, 100) == pytest.approx(0.04, abs=1e-12)
    assert proportion_standard_error(0, 5) == 0


def test_wilson_interval_by_hand():
    # n = 10, p = 0.5, z = 1.959964: centre 0.5, half width
    # z / (1 + z^2 / n) * sqrt(p q / n + z^2 / (4 n^2)) = 1.959964 / 1.384146 * 0.186015
    low, high = wilson_interval(5, 10)
    assert (low, high) == pytest.approx((0.236593, 0.763407), abs=1e-6)


def test_wilson_interval_at_zero_is_not_empty():
    # p = 0: from 0 to z^2 / (n + z^2) = 3.841459 / 203.841459
    low, high = wilson_interval(0, 200)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(0.0188453, abs=1e-6)


def test_mean_over_seeds():
    # mean 4, deviations -2, 0, 2, variance 8 / 2 = 4, standard error 2 / sqrt(3)
    mean, error = mean_and_standard_error([2.0, 4.0, 6.0])
    assert mean == 4
    assert error == pytest.approx(2 / math.sqrt(3), abs=1e-12)


def test_one_seed_has_no_spread():
    with pytest.raises(ValueError, match="two values"):
        mean_and_standard_error([0.5])


def test_win_rate_of_the_paper():
    # Qwen2.5-0.5B daDPO: 75 wins, 16 ties, 209 losses; mean -134 / 300,
    # variance 284 / 300 - 0.199511 = 0.747156, error sqrt(0.747156 / 300) = 0.049905
    percent, error = win_rate(75, 16, 209)
    assert percent == pytest.approx(-44.666667, abs=1e-6)
    assert error == pytest.approx(4.990510, abs=1e-5)


def test_win_rate_of_ties_and_of_wins_alone_has_no_error():
    assert win_rate(0, 7, 0) == (0, 0)
    assert win_rate(3, 0, 0) == (100, 0)


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, -1, 1)])
def test_win_rate_refuses_no_verdicts(counts):
    with pytest.raises(ValueError, match="no verdicts"):
        win_rate(*counts)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_shares_are_refused(right, n):
    with pytest.raises(ValueError, match="not a share"):
        proportion_standard_error(right, n)
