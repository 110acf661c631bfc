"""The odds ratio against 60 digits: values, gradients, and how near float32 and float64 come."""

import mpmath
import pytest
import torch

from training.losses import odds_ratio_loss, odds_ratio_margin

# chosen, rejected -> log-odds difference, logsigmoid of it: as published, rounded to 12 places.
PUBLISHED = [
    (-0.5, -1.5, 1.680269670642, -0.170859217146),
    (-1.5, -0.5, -1.680269670642, -1.851128887788),
    (-1e-7, -2, 17.972682143089, -0.000000015652),
    (-2, -1e-7, -17.972682143089, -17.972682158741),
    (-1e-10, -1e-9, 2.302585093444, -0.095310179763),
    (-20, -0.01, -24.600166017264, -24.600166017284),
    (-0.05, -0.06, 0.187367387798, -0.603845399787),
]
MEANS = [-1e-10, -1e-9, -2e-8, -1e-7, -1e-3, -0.01, -0.05, -0.06, -0.5, -0.7, -1.5, -2, -20, -80]
# What the margin may be off by, times its largest term where that is above 1.
PRECISIONS = [(torch.float64, 1e-14), (torch.float32, 1e-6)]


def precisely(chosen, rejected):
    """Margin, loss, and the loss's derivatives by both means: 60 digits, of exact inputs."""
    chosen, rejected = mpmath.mpf(chosen), mpmath.mpf(rejected)
    margin = chosen - rejected + mpmath.log((1 - mpmath.exp(rejected)) / (1 - mpmath.exp(chosen)))
    unlikely = 1 / (1 + mpmath.exp(margin))
    slopes = -unlikely / (1 - mpmath.exp(chosen)), unlikely / (1 - mpmath.exp(rejected))
    return margin, mpmath.log1p(mpmath.exp(-margin)), *slopes


@pytest.mark.parametrize(("chosen", "rejected", "margin", "logsigmoid"), PUBLISHED)
def test_published_values_are_those_of_sixty_digits(chosen, rejected, margin, logsigmoid):
    with mpmath.workdps(60):
        exact = precisely(str(chosen), str(rejected))
        assert abs(exact[0] - mpmath.mpf(str(margin))) <= mpmath.mpf("0.5e-12")
        assert abs(exact[1] + mpmath.mpf(str(logsigmoid))) <= mpmath.mpf("0.5e-12")


@pytest.mark.parametrize(("chosen", "rejected", "margin", "logsigmoid"), PUBLISHED)
def test_published_values_come_out_in_float64(chosen, rejected, margin, logsigmoid):
    pair = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected)]
    assert odds_ratio_margin(*pair).item() == pytest.approx(margin, abs=1e-12)
    assert odds_ratio_loss(*pair).item() == pytest.approx(-logsigmoid, abs=1e-12)


@pytest.mark.parametrize(("dtype", "accuracy"), PRECISIONS)
@pytest.mark.parametrize("chosen", MEANS)
def test_values_and_gradients_in_either_precision(chosen, dtype, accuracy):
    for rejected in MEANS:
        pair = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
        loss = odds_ratio_loss(*pair)
        slopes = torch.autograd.grad(loss, pair)
        with mpmath.workdps(60):
            margin, *others = (float(x) for x in precisely(*(x.item() for x in pair)))
        allowed = accuracy * max(1, abs(chosen), abs(rejected), abs(margin))
        assert odds_ratio_margin(*pair).item() == pytest.approx(margin, abs=allowed, rel=0)
        # An error of the margin becomes a relative one of what falls off exponentially; float32
        # has fewer digits near its smallest number.
        for found, expected in zip((loss, *slopes), others, strict=True):
            assert found.item() == pytest.approx(expected, rel=5 * allowed, abs=1e-33)
