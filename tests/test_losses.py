import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.losses import (
    cap_gradient,
    contrast_figures,
    mean_log_probability,
    odds_ratio_loss,
    rejected_gradient,
)

EXTREMES = [0.0, -2e-8, -1e-3, -80.0]


def _tensor(value, dtype=torch.float64, **more):
    return torch.tensor([value], dtype=dtype, **more)


def test_a_value_by_hand():
    # P = 1/2 has log-odds 0; P = 1/4 has log(1/3). Margin log 3; sigmoid 3/4; loss log(4/3).
    loss = odds_ratio_loss(_tensor(math.log(0.5)), _tensor(math.log(0.25)))
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-12)


@given(st.floats(-30, -1e-3), st.floats(-30, -1e-3))
def test_the_plain_formula_in_float64(chosen, rejected):
    def log_odds(logp):
        return logp - math.log1p(-math.exp(logp))

    margin = log_odds(chosen) - log_odds(rejected)
    plain = math.log1p(math.exp(-margin)) if margin > -700 else -margin
    found = odds_ratio_loss(_tensor(chosen), _tensor(rejected)).item()
    assert found == pytest.approx(plain, rel=1e-9, abs=1e-12)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected():
    chosen, rejected = (_tensor(-1.0, requires_grad=True) for _ in range(2))
    odds_ratio_loss(chosen, rejected).backward()
    # sigmoid(0) / (1 - 1/e) on either side
    assert chosen.grad.item() == pytest.approx(-0.5 / (1 - math.exp(-1)))
    assert rejected.grad.item() == pytest.approx(0.5 / (1 - math.exp(-1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rejected", EXTREMES)
@pytest.mark.parametrize("chosen", EXTREMES)
def test_extremes_are_finite_in_value_and_gradient(chosen, rejected, dtype):
    pair = [_tensor(x, dtype, requires_grad=True) for x in (chosen, rejected)]
    loss = odds_ratio_loss(*pair)
    loss.backward()
    for value in (loss, pair[0].grad, pair[1].grad):
        assert torch.isfinite(value).all()


def test_near_certain_negatives_keep_their_true_gradient_without_a_cap():
    rejected = _tensor(-1e-6, torch.float32, requires_grad=True)
    odds_ratio_loss(_tensor(-1.0, torch.float32), rejected).backward()
    assert rejected.grad.item() == pytest.approx(1e6, rel=1e-4)  # 1 / |log P|


def test_bf16_is_widened_before_any_odds_are_formed():
    # exp(-0.001) rounds to 1 in bf16: its log(1 - P) would be -inf.
    pair = _tensor(-0.001, torch.bfloat16), _tensor(-0.002, torch.bfloat16)
    loss = odds_ratio_loss(*pair)
    assert loss.dtype == torch.float32
    exact = odds_ratio_loss(*(x.double() for x in pair))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_cap_bounds_each_pairs_gradient_whatever_the_loss_is_scaled_by():
    chosen = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    rejected = torch.tensor([-1e-9, -1e-3, -1.0], dtype=torch.float64, requires_grad=True)
    gradient = rejected_gradient(chosen, rejected)
    capped = cap_gradient(rejected, gradient, cap=10.0)
    (odds_ratio_loss(chosen, capped).sum() / 32).backward()
    free = torch.sigmoid(torch.zeros(1, dtype=torch.float64)) / (1 - math.exp(-1))
    expected = torch.tensor([10.0, 10.0, free.item()], dtype=torch.float64) / 32
    torch.testing.assert_close(rejected.grad, expected)
    assert (gradient > 10).tolist() == [True, True, False]
    assert torch.equal(capped, rejected), "the cap must not change the loss"


def test_the_gradient_that_is_told_is_the_one_sent_back():
    chosen = torch.tensor([-0.5, -2.0, -1.0], dtype=torch.float64)
    rejected = torch.tensor([-1.5, -1e-4, -80.0], dtype=torch.float64, requires_grad=True)
    odds_ratio_loss(chosen, rejected).sum().backward()
    torch.testing.assert_close(rejected_gradient(chosen, rejected), rejected.grad)


def test_the_cap_is_finite_at_certainty():
    chosen, rejected = _tensor(-1.0, torch.float32), torch.zeros(1, requires_grad=True)
    gradient = rejected_gradient(chosen, rejected)
    odds_ratio_loss(chosen, cap_gradient(rejected, gradient, cap=5.0)).backward()
    assert rejected.grad.item() == gradient.item() == 1, "log(1 - P) is clamped, its slope is 0"


@pytest.mark.parametrize("certain", [-2e-12, -1e-9, -2e-8])
def test_the_cap_is_what_flows_back_through_near_certain_negatives(certain):
    chosen = _tensor(-1.0, torch.float32)
    rejected = _tensor(certain, torch.float32, requires_grad=True)
    capped = cap_gradient(rejected, rejected_gradient(chosen, rejected), cap=5.0)
    odds_ratio_loss(chosen, capped).backward()
    assert rejected.grad.item() == pytest.approx(5)


def test_figures_are_detached_and_about_each_pair():
    chosen = torch.tensor([-0.5, -2.0], requires_grad=True)
    figures = contrast_figures(chosen, torch.tensor([-1.5, -1.0]))
    assert not any(value.requires_grad for value in figures.values())
    assert figures["accuracy"].tolist() == [1.0, 0.0]
    assert figures["margin"][0].item() == pytest.approx(1.680269670642, rel=1e-6)


def test_means_divide_by_tokens_and_survive_an_empty_span():
    means = mean_log_probability(torch.tensor([-6.0, 0.0]), torch.tensor([3, 0]))
    assert means.tolist() == [-2.0, 0.0]
