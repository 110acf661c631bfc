"""daDPO, its two halves, and KTO: losses on SUMS of response log-probabilities.

All inputs are nats, [B], and gradients reach the policy's alone: reference and teacher are
constants of a pair, KTO's estimate of the KL is one of the batch. They may come in float64: of a
sum of -1000, float32 keeps 4 digits after the point.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.precision import widen


def dadpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    teacher_chosen: Tensor | None,
    teacher_rejected: Tensor | None,
    beta1: float,
    beta2: float,
) -> Tensor:
    """DPO anchored at a reference and at the teacher, arXiv:2506.15717 Algorithm 1. [B] -> [B].

    -logsigmoid(beta1 * (r(chosen) - r(rejected)) + beta2 * (r_te(chosen) - r_te(rejected))) with
    r(y) = log policy(y) - log reference(y) and r_te(y) = log policy(y) - log teacher(y).

    beta2 = 0 is dDPO (plain DPO), beta1 = 0 is rDPO (DPO with the teacher as reference). The side
    whose beta is 0 is not looked at: it may be None.
    """
    policy = policy_chosen, policy_rejected
    reference_term = _term(*policy, reference_chosen, reference_rejected, beta1)
    return -logsigmoid(reference_term + _term(*policy, teacher_chosen, teacher_rejected, beta2))


def dadpo_figures(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    teacher_chosen: Tensor | None,
    teacher_rejected: Tensor | None,
    beta1: float,
    beta2: float,
) -> dict[str, Tensor]:
    """What one asks about `dadpo_loss`, detached, each [B]; for KTO on pairs, give beta2 = 0.

    reward_chosen, reward_rejected: beta1 * r(y) + beta2 * r_te(y); margin: what the sigmoid sees;
    accuracy: 1 where the margin is above 0, else 0; teacher_term: the size of the margin's part
    that beta2 weighs, which over long answers reaches hundreds and then saturates the sigmoid.
    """
    chosen, rejected = policy_chosen.detach(), policy_rejected.detach()
    teacher_term = _term(chosen, rejected, teacher_chosen, teacher_rejected, beta2)
    margin = _term(chosen, rejected, reference_chosen, reference_rejected, beta1) + teacher_term

    def reward(policy: Tensor, reference: Tensor | None, teacher: Tensor | None) -> Tensor:
        first = beta1 * _log_ratio(policy, reference, beta1)
        return first + beta2 * _log_ratio(policy, teacher, beta2)

    return {
        "reward_chosen": reward(chosen, reference_chosen, teacher_chosen),
        "reward_rejected": reward(rejected, reference_rejected, teacher_rejected),
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
        "teacher_term": teacher_term.abs(),
    }


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable_mask: Tensor,
    kl_estimate: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO on single answers, arXiv:2402.01306 eq. 7 and 8. [B] -> [B], from 0 to the weight.

    weight * (1 - sigmoid(beta * (r(y) - z))) for a desirable answer, with z - r(y) for an
    undesirable one, and r(y) = log policy(y) - log reference(y). `desirable_mask` is bool [B].
    `kl_estimate`, a scalar or [1], is the mean of r over answers put to another prompt's question,
    reduced over all workers by the caller; z is that, or 0 where it is below, and a constant.
    """
    z = widen(torch.as_tensor(kl_estimate)).detach().clamp(min=0)
    above = beta * (widen(policy) - widen(reference).detach() - z)
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where it is small.
    desirable = desirable_weight * torch.sigmoid(-above)
    return torch.where(desirable_mask.bool(), desirable, undesirable_weight * torch.sigmoid(above))


def _term(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    anchor_chosen: Tensor | None,
    anchor_rejected: Tensor | None,
    beta: float,
) -> Tensor:
    # Each ratio first: policy and anchor lie near one another, and then float32 subtracts exactly.
    chosen = _log_ratio(policy_chosen, anchor_chosen, beta)
    return beta * (chosen - _log_ratio(policy_rejected, anchor_rejected, beta))


def _log_ratio(policy: Tensor, anchor: Tensor | None, beta: float) -> Tensor:
    # An anchor that weighs nothing is not looked at: 0 * inf would be NaN.
    if beta == 0:
        return torch.zeros_like(widen(policy))
    assert anchor is not None, f"beta {beta} needs the log-probabilities that it weighs"
    return widen(policy) - widen(anchor).detach()
