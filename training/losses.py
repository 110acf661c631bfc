"""Losses: pure functions of log-probabilities, [B] in and [B] out, and what is worth logging.

They compute in float32, or in float64 where that is given; lower precisions are widened first. The
caller divides by counts of the whole global batch. ORPO's are here; the others can be imported from
here too.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.divergence import position_kl, token_kl
from training.precision import widen
from training.preference import dadpo_figures, dadpo_loss, kto_loss

__all__ = [
    "cap_gradient",
    "contrast_figures",
    "dadpo_figures",
    "dadpo_loss",
    "kto_loss",
    "mean_log_probability",
    "odds_ratio_loss",
    "odds_ratio_margin",
    "position_kl",
    "rejected_gradient",
    "token_kl",
]

# log(1 - p) is taken no nearer to p = 1 than this, in nats; papers' values down to -1e-10 survive.
_NEAREST_TO_CERTAIN = -1e-12


def mean_log_probability(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean log-probability per token (nats) from sums [B] and token counts [B] -> [B]."""
    return widen(sums) / counts.clamp(min=1)


def odds_ratio_loss(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor) -> Tensor:
    """ORPO's contrast of two answers, arXiv:2403.07691 eq. 6 and 7. [B], [B] -> [B], above 0.

    -logsigmoid(logodds(chosen) - logodds(rejected)) with logodds(P) = log P - log(1 - P). Both
    inputs are mean log-probabilities per response token (nats), at most 0.
    """
    return -logsigmoid(odds_ratio_margin(chosen_mean_logp, rejected_mean_logp))


def odds_ratio_margin(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor) -> Tensor:
    """How much higher the log-odds of `chosen` are than those of `rejected`. [B], [B] -> [B]."""
    chosen, rejected = widen(chosen_mean_logp), widen(rejected_mean_logp)
    return (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))


def rejected_gradient(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor) -> Tensor:
    """What `odds_ratio_loss` sends back through each negative, detached. [B], [B] -> [B], above 0.

    d loss / d rejected = sigmoid(-margin) / (1 - P_rejected), which grows like 1 / |log P| for a
    negative that the policy is sure of; at certainty itself, where log(1 - P) is clamped, it is
    sigmoid(-margin).
    """
    chosen, rejected = widen(chosen_mean_logp).detach(), widen(rejected_mean_logp).detach()
    unlikely = torch.sigmoid(-odds_ratio_margin(chosen, rejected))
    growth = 1 / -torch.expm1(rejected.clamp(max=_NEAREST_TO_CERTAIN))
    return unlikely * growth.where(rejected <= _NEAREST_TO_CERTAIN, 1.0)


def cap_gradient(values: Tensor, gradient: Tensor, cap: float) -> Tensor:
    """The same values [B], through which at most `cap` of `gradient` [B] flows back for each.

    `gradient`, above 0, is what would flow back else.
    """
    kept = (cap / gradient).clamp(max=1)
    return values.detach() + kept * (values - values.detach())


def contrast_figures(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor) -> dict[str, Tensor]:
    """What one asks about the contrast, detached, each [B].

    margin: difference of log-odds; accuracy: 1 where chosen is the likelier, else 0; both
    log-probabilities per token.
    """
    chosen, rejected = widen(chosen_mean_logp).detach(), widen(rejected_mean_logp).detach()
    return {
        "margin": odds_ratio_margin(chosen, rejected),
        "accuracy": (chosen > rejected).to(chosen.dtype),
        "chosen_logp": chosen,
        "rejected_logp": rejected,
    }


def _log_one_minus_exp(x: Tensor) -> Tensor:
    # log(-expm1(x)) keeps its digits near 0, where log1p(-exp(x)) is infinite. The clamp is on the
    # input: a torch.where over two branches would leak NaN from the gradient of the one not taken.
    return torch.log(-torch.expm1(x.clamp(max=_NEAREST_TO_CERTAIN)))
