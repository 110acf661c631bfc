"""daDPO, its two halves and KTO, on sums of response log-probabilities."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.losses import dadpo_figures, dadpo_loss, kto_loss

SUMS = st.floats(-3000, 0)
BETAS = st.floats(1e-3, 1)
# As sums: certainty, next to it, and an answer that nobody would give.
EXTREMES = [0.0, -2e-8, -1e-3, -80.0, -1e4]
NOTHING = [None, math.nan, math.inf, -math.inf]


def row(*values, dtype=torch.float64, **more):
    return torch.tensor(values, dtype=dtype, **more)


def pairs(count=8, dtype=torch.float64):
    """Policy, reference and teacher sums of chosen and rejected, [6, count]: long answers."""
    random = torch.Generator().manual_seed(3)
    base = -400 * torch.rand(2, count, generator=random, dtype=torch.float64)
    near = 20 * torch.randn(6, count, generator=random, dtype=torch.float64)
    return (base.repeat(3, 1) + near).clamp(max=0).to(dtype)


def test_a_pair_by_hand():
    # r = -10 + 12 = 2 and -20 + 19 = -1; r_te = -10 + 11 = 1 and -20 + 25 = 5.
    # Margin 0.1 * (2 + 1) + 0.2 * (1 - 5) = -0.5; loss log(1 + e^0.5).
    sums = [row(x) for x in (-10, -20, -12, -19, -11, -25)]
    loss = dadpo_loss(*sums, beta1=0.1, beta2=0.2)
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-15)
    figures = {name: value.item() for name, value in dadpo_figures(*sums, 0.1, 0.2).items()}
    assert figures == pytest.approx(
        {
            "reward_chosen": 0.1 * 2 + 0.2 * 1,
            "reward_rejected": 0.1 * -1 + 0.2 * 5,
            "margin": -0.5,
            "accuracy": 0.0,
            "teacher_term": 0.8,
        }
    )


def plain_dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    ratio = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -torch.nn.functional.logsigmoid(beta * ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unused", NOTHING)
def test_without_the_teacher_it_is_exactly_dpo_on_the_reference(unused, dtype):
    policy, reference, _ = pairs(dtype=dtype).view(3, 2, -1)
    teacher = [None, None] if unused is None else torch.full_like(policy, unused)
    policy.requires_grad_()
    found = dadpo_loss(*policy, *reference, *teacher, beta1=0.1, beta2=0)
    expected = plain_dpo(*policy, *reference, beta=0.1)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), policy)[0])
    figures = dadpo_figures(*policy, *reference, *teacher, 0.1, 0)
    assert torch.equal(figures["margin"], figures["margin"].nan_to_num(7))
    assert figures["teacher_term"].tolist() == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unused", NOTHING)
def test_without_the_reference_it_is_exactly_dpo_on_the_teacher(unused, dtype):
    policy, _, teacher = pairs(dtype=dtype).view(3, 2, -1)
    reference = [None, None] if unused is None else torch.full_like(policy, unused)
    policy.requires_grad_()
    found = dadpo_loss(*policy, *reference, *teacher, beta1=0, beta2=0.01)
    expected = plain_dpo(*policy, *teacher, beta=0.01)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), policy)[0])


def test_a_side_that_is_weighed_must_be_there():
    policy, reference, _ = pairs().view(3, 2, -1)
    with pytest.raises(AssertionError, match=r"beta 0\.2"):
        dadpo_loss(*policy, *reference, None, None, beta1=0.1, beta2=0.2)


@settings(deadline=None)
@given(st.lists(SUMS, min_size=6, max_size=6), BETAS, BETAS)
def test_it_is_dpo_on_the_mixture_of_reference_and_teacher(sums, beta1, beta2):
    policy, reference, teacher = row(*sums)[:, None].view(3, 2, 1)
    mixed = (beta1 * reference + beta2 * teacher) / (beta1 + beta2)
    found = dadpo_loss(*policy, *reference, *teacher, beta1, beta2)
    expected = plain_dpo(*policy, *mixed, beta=beta1 + beta2)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def precisely(sums, beta1, beta2):
    """The loss and its gradient by the chosen sum, of exact inputs, with 60 digits."""
    with mpmath.workdps(60):
        beta1, beta2 = mpmath.mpf(beta1), mpmath.mpf(beta2)
        chosen, rejected, *constants = (mpmath.mpf(x) for x in sums)
        reference = (chosen - constants[0]) - (rejected - constants[1])
        teacher = (chosen - constants[2]) - (rejected - constants[3])
        tail = mpmath.exp(-(beta1 * reference + beta2 * teacher))
        return float(mpmath.log1p(tail)), float(-(beta1 + beta2) * tail / (1 + tail))


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_sums_of_hundreds_against_sixty_digits(dtype, accuracy):
    for column in pairs(64, dtype).T:
        sums = [x.reshape(1) for x in column]
        sums[0].requires_grad_()
        loss = dadpo_loss(*sums, beta1=0.1, beta2=0.5)
        loss.backward()
        value, gradient = precisely(column.tolist(), 0.1, 0.5)
        assert loss.item() == pytest.approx(value, rel=accuracy)
        assert sums[0].grad.item() == pytest.approx(gradient, rel=accuracy)


def test_the_gradient_is_that_of_finite_differences_and_the_policys_alone():
    sums = [x.requires_grad_() for x in pairs(4).div(20).detach()]
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: dadpo_loss(chosen, rejected, *sums[2:], 0.1, 0.2), sums[:2]
    )
    dadpo_loss(*sums, 0.1, 0.2).sum().backward()
    assert (sums[0].grad < 0).all(), "the chosen answer must become likelier"
    assert (sums[1].grad > 0).all(), "the rejected answer must become less likely"
    assert [x.grad for x in sums[2:]] == [None] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rejected", EXTREMES)
@pytest.mark.parametrize("chosen", EXTREMES)
def test_extreme_sums_are_finite_in_value_and_gradient(chosen, rejected, dtype):
    policy = [row(x, dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
    for constants in ([0.0] * 4, [-1e4] * 4, [rejected, chosen] * 2):
        anchors = [row(x, dtype=dtype) for x in constants]
        loss = dadpo_loss(*policy, *anchors, beta1=0.1, beta2=1)
        gradients = torch.autograd.grad(loss, policy)
        assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert 0 <= loss.item() < 3e4
        assert all(gradient.abs().item() <= 1.11 for gradient in gradients)  # beta1 + beta2 in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_sigmoid_keeps_its_gradient_on_the_losing_side(dtype):
    # The margin is -11000: the loss is its size, and its slope beta1 + beta2.
    policy = [row(-1e4, dtype=dtype, requires_grad=True), row(0.0, dtype=dtype)]
    loss = dadpo_loss(*policy, *[row(0.0, dtype=dtype)] * 4, beta1=0.1, beta2=1)
    loss.backward()
    assert loss.item() == pytest.approx(11000, rel=1e-6)
    assert policy[0].grad.item() == pytest.approx(-1.1, rel=1e-6)


def test_bf16_sums_are_widened_before_they_are_subtracted():
    sums = pairs(dtype=torch.bfloat16)
    exact = dadpo_loss(*sums.double(), 0.1, 0.2)
    torch.testing.assert_close(dadpo_loss(*sums, 0.1, 0.2).double(), exact, rtol=1e-4, atol=1e-5)


def test_figures_are_detached():
    sums = pairs().requires_grad_()
    figures = dadpo_figures(*sums, 0.1, 0.2)
    assert not any(value.requires_grad for value in figures.values())
    difference = figures["reward_chosen"] - figures["reward_rejected"]
    torch.testing.assert_close(figures["margin"], difference)
    assert figures["accuracy"].tolist() == (figures["margin"] > 0).double().tolist()


def test_kto_by_hand():
    # r = log 3 over the estimate log 2, and the same below it: with beta 1, sigmoid(log 1.5) = 0.6.
    policy, reference = row(-10.0, -10.0), row(-10.0, -10.0) - math.log(3)
    loss = kto_loss(policy, reference, torch.tensor([True, False]), row(math.log(2)), 1, 0.3, 7)
    assert loss.tolist() == pytest.approx([0.3 * 0.4, 7 * 0.6], abs=1e-14)


def test_an_estimate_below_zero_counts_as_zero():
    policy, reference, mask = row(-3.0, -5.0), row(-4.0, -4.5), torch.tensor([True, False])
    below, at = (kto_loss(policy, reference, mask, row(kl), beta=0.1) for kl in (-2.0, 0.0))
    assert torch.equal(below, at)
    assert not torch.equal(at, kto_loss(policy, reference, mask, row(0.5), beta=0.1))


def test_ktos_gradient_is_that_of_finite_differences_and_the_policys_alone():
    policy, reference = (x.div(20).detach().requires_grad_() for x in pairs(6)[:2])
    mask, kl = torch.tensor([True, False] * 3), torch.tensor(0.7, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda policy: kto_loss(policy, reference, mask, kl.double(), 0.5, 1.5, 0.5), policy
    )
    kto_loss(policy, reference, mask, kl, beta=0.5).sum().backward()
    assert (policy.grad[mask] < 0).all()
    assert (policy.grad[~mask] > 0).all()
    assert reference.grad is None
    assert kl.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.01, 10])
def test_kto_at_the_extremes_is_finite_and_within_its_bounds(beta, dtype):
    policy = row(*EXTREMES, dtype=dtype, requires_grad=True)
    for anchor in EXTREMES:
        for desirable in (True, False):
            mask = torch.full((len(EXTREMES),), desirable)
            reference = row(*[anchor] * len(EXTREMES), dtype=dtype)
            loss = kto_loss(policy, reference, mask, torch.tensor(3.0), beta)
            (gradient,) = torch.autograd.grad(loss.sum(), policy)
            assert torch.isfinite(gradient).all()
            assert ((loss >= 0) & (loss <= 1)).all()


def test_kto_keeps_the_digits_of_a_small_loss():
    # 1 - sigmoid(40) is 0 in float32; sigmoid(-40) is 4.2e-18.
    loss = kto_loss(
        *row(-1.0, -41.0, dtype=torch.float32)[:, None], torch.tensor([True]), row(0), 1
    )
    assert loss.item() == pytest.approx(1 / (1 + math.exp(40)), rel=1e-5, abs=0)


def dadpo_of(values, pairs_taken):
    return dadpo_loss(*values[:, pairs_taken], beta1=0.01, beta2=0.001)


def kto_of(values, pairs_taken):
    policy, reference = values[0, pairs_taken], values[2, pairs_taken]
    return kto_loss(policy, reference, pairs_taken % 3 == 0, row(1.0), 0.01)


@pytest.mark.parametrize("loss_of", [dadpo_of, kto_of])
def test_accumulation_changes_nothing(loss_of):
    def gradient(micro_batch):
        values = pairs(8).requires_grad_()
        for pairs_taken in torch.arange(8).split(micro_batch):
            (loss_of(values, pairs_taken).sum() / 8).backward()
        return values.grad

    whole = gradient(8)
    assert whole.abs().max() > 1e-5
    torch.testing.assert_close(gradient(2), whole, rtol=0, atol=1e-9)
