"""Numbers with their uncertainty: proportions, means over seeds, win rates."""

import math
from collections.abc import Sequence


def proportion_standard_error(right: int, n: int) -> float:
    """sqrt(p (1 - p) / n), the standard error of the share p = right / n. n is above 0."""
    share = _share(right, n)
    return math.sqrt(share * (1 - share) / n)


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of the share right / n; unlike p +- 2 SE it is right near 0 and 1."""
    from scipy.stats import binomtest

    _share(right, n)
    interval = binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and s / sqrt(n), with s the sample's deviation (n - 1).

    Raises ValueError for fewer than two values: one seed says nothing about their spread.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"a standard error over seeds needs two values or more, got {n}")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def win_rate(wins: int, ties: int, losses: int) -> tuple[float, float]:
    """daDPO's in-domain score (arXiv:2506.15717) in percent, -100 to 100, and its standard error.

    (wins - losses) / n * 100: the mean of n verdicts of +1, 0 or -1, whose variance is
    (wins + losses) / n - mean^2. Raises ValueError where there is no verdict.
    """
    if min(wins, ties, losses) < 0 or wins + ties + losses == 0:
        raise ValueError(f"no verdicts to average: wins={wins}, ties={ties}, losses={losses}")
    n = wins + ties + losses
    mean = (wins - losses) / n
    variance = (wins + losses) / n - mean**2
    return 100 * mean, 100 * math.sqrt(max(variance, 0.0) / n)


def _share(right: int, n: int) -> float:
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} of {n} is not a share: an evaluation needs at least one answer")
    return right / n
