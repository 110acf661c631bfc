"""What a method makes of a micro-batch: its part of the global batch's loss, and figures of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cluster.sections import Training
from pipeline.logprobs import ResponseLogProbs, TokenBatch
from training.batches import BatchCounts
from training.losses import (
    cap_gradient,
    contrast_figures,
    dadpo_figures,
    dadpo_loss,
    kto_loss,
    mean_log_probability,
    odds_ratio_loss,
    position_kl,
    rejected_gradient,
)

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch as tensors, and which spans are the pairs' parts."""

    tokens: TokenBatch
    prompts: list[int]  # spans of the prompts, one a pair
    chosen: list[int]  # one a pair
    contrasted: list[int]  # indices of pairs that have a negative
    rejected: list[int]  # spans of the negatives, one for each of `contrasted`
    anchors: dict[str, Tensor]  # training.batches.Anchors by name, float64 [B]
    for_teacher: TokenBatch | None = None  # its prompts with the chosen answers, for the KL

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            anchors={name: values.to(device) for name, values in self.anchors.items()},
            for_teacher=self.for_teacher and self.for_teacher.to(device),
        )


@dataclass(frozen=True)
class Objective:
    """What one optimizer step minimises.

    Losses are divided by counts of the global batch, so that the parts of all micro-batches and
    workers add up to its loss. A pair without a negative adds 0 to a contrast, and counts.
    """

    training: Training
    counts: BatchCounts
    kl_estimate: Tensor | None = None  # KTO's, a scalar of the global batch
    teacher: ResponseLogProbs | None = None  # of the token-level KL

    def loss(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Figures]:
        """A micro-batch's part of the loss, a scalar, and sums over its pairs, detached."""
        if self.teacher is None:
            loss, figures = self._of_responses(model(batch.tokens), batch)
        else:
            logps, distance = self._of_tokens(self.teacher, model, batch)
            loss, figures = self._of_responses(logps, batch)
            loss = loss + self.training.kl_weight * distance / self.counts.pairs
            figures["kl"] = distance.detach()
        return loss, figures | {"loss": loss.detach()}

    def _of_responses(self, token_logps: Tensor, batch: PairBatch) -> tuple[Tensor, Figures]:
        responses = _Responses(token_logps, batch)
        loss, figures = _METHODS[self.training.method](responses, self)
        return loss, figures | {"chosen_logp": responses.chosen_mean.detach().sum()}

    def _of_tokens(
        self, teacher: ResponseLogProbs, model: nn.Module, batch: PairBatch
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of scored tokens, and the sum over pairs of the KL to the teacher.

        A pair's KL is the mean over the tokens of its chosen answer (arXiv:2506.15717).
        """
        tokens, chosen = batch.tokens, torch.tensor(batch.chosen, device=batch.tokens.spans.device)
        keep = torch.isin(tokens.spans, chosen)
        logps, logits = model(tokens, keep)
        assert batch.for_teacher is not None
        with torch.no_grad():
            aimed_at = teacher.logits(batch.for_teacher)
        distances = position_kl(logits, aimed_at, self.training.kl_direction)
        return logps, (distances / tokens.counts[tokens.spans[keep]]).sum()


@dataclass
class _Responses:
    """Log-probabilities of a micro-batch's responses, sums and means over their tokens."""

    token_logps: Tensor
    batch: PairBatch
    sums: Tensor = field(init=False)
    means: Tensor = field(init=False)

    def __post_init__(self) -> None:
        tokens = self.batch.tokens
        self.sums = tokens.span_sums(self.token_logps)
        self.means = mean_log_probability(self.sums, tokens.counts)

    @property
    def chosen_mean(self) -> Tensor:
        return self.means[self.batch.chosen]

    def anchors(self, whose: str) -> tuple[Tensor, Tensor]:
        """Of the pairs that have a negative: of chosen and rejected answers under that model."""
        pairs = self.batch.contrasted
        given = self.batch.anchors
        return given[f"{whose}_chosen"][pairs], given[f"{whose}_rejected"][pairs]


def _sft(responses: _Responses, objective: Objective) -> tuple[Tensor, Figures]:
    batch, counts = responses.batch, objective.counts
    sums = responses.sums[batch.chosen] + responses.sums[batch.prompts]
    if objective.training.nll_reduction == "tokens":
        nll = -sums.sum()
        loss = nll / counts.nll_tokens
    else:
        tokens = batch.tokens.counts[batch.chosen] + batch.tokens.counts[batch.prompts]
        nll = -mean_log_probability(sums, tokens).sum()
        loss = nll / counts.pairs
    return loss, {"nll": nll.detach()}


def _orpo(responses: _Responses, objective: Objective) -> tuple[Tensor, Figures]:
    batch, training = responses.batch, objective.training
    nll, figures = _sft(responses, objective)
    chosen = responses.chosen_mean[batch.contrasted]
    rejected, cap = responses.means[batch.rejected], training.odds_gradient_cap
    of_pairs = contrast_figures(chosen, rejected)
    del of_pairs["chosen_logp"]  # that of all pairs is told
    gradient = rejected_gradient(chosen, rejected)
    if cap is not None:
        rejected = cap_gradient(rejected, gradient, cap)
        figures["capped"] = (gradient > cap).sum()
    odds_ratio = odds_ratio_loss(chosen, rejected).sum()
    figures |= {name: values.sum() for name, values in of_pairs.items()}
    figures["odds_ratio"] = odds_ratio.detach()
    figures["largest_gradient"] = gradient.max() if len(gradient) else gradient.sum()
    return nll + training.odds_ratio_weight * odds_ratio / objective.counts.pairs, figures


def _dadpo(responses: _Responses, objective: Objective) -> tuple[Tensor, Figures]:
    training = objective.training
    compared = (
        *_chosen_and_rejected(responses),
        *responses.anchors("reference"),
        *responses.anchors("teacher"),
        training.reference_weight,
        training.teacher_weight,
    )
    preference = dadpo_loss(*compared).sum()
    return preference / objective.counts.pairs, _rewards(responses, preference, compared)


def _kto(responses: _Responses, objective: Objective) -> tuple[Tensor, Figures]:
    batch, training = responses.batch, objective.training
    chosen, rejected = responses.sums[batch.chosen], responses.sums[batch.rejected]
    references = batch.anchors["reference_chosen"], responses.anchors("reference")[1]
    desirable = torch.arange(len(chosen) + len(rejected), device=chosen.device) < len(chosen)
    assert objective.kl_estimate is not None
    preference = kto_loss(
        torch.cat([chosen, rejected]),
        torch.cat(references),
        desirable,
        objective.kl_estimate,
        training.reference_weight,
        training.desirable_weight,
        training.undesirable_weight,
    ).sum()
    pair = *_chosen_and_rejected(responses), *responses.anchors("reference"), None, None
    compared = (*pair, training.reference_weight, 0.0)
    return preference / objective.counts.answers, _rewards(responses, preference, compared)


def _chosen_and_rejected(responses: _Responses) -> tuple[Tensor, Tensor]:
    batch = responses.batch
    return responses.sums[batch.chosen][batch.contrasted], responses.sums[batch.rejected]


def _rewards(responses: _Responses, preference: Tensor, compared: Any) -> Figures:
    figures = {name: values.sum() for name, values in dadpo_figures(*compared).items()}
    figures["rejected_logp"] = responses.means[responses.batch.rejected].detach().sum()
    return figures | {"preference": preference.detach()}


_METHODS: dict[str, Callable[[_Responses, Objective], tuple[Tensor, Figures]]] = {
    "sft": _sft,
    "orpo": _orpo,
    "dadpo": _dadpo,
    "kto": _kto,
}
