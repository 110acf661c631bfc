"""Our losses on a batch: the log-probabilities of pipeline.logprobs, the losses of training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.batch import IGNORED, PAD, Batch, padded
from pipeline.logprobs import ResponseLogProbs, Row, collate
from training.losses import (
    dadpo_loss,
    kto_loss,
    mean_log_probability,
    odds_ratio_loss,
    token_kl,
)


@dataclass(frozen=True)
class Spans:
    """Sums of log-probabilities and counts of tokens, of prompts and of their answers, each [B]."""

    prompts: Tensor
    answers: Tensor
    prompt_tokens: Tensor
    answer_tokens: Tensor


def score(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> Spans:
    rows = [Row(prompt, [ids], True) for prompt, ids in zip(prompts, answers, strict=True)]
    batch = collate(rows, PAD)
    sums = batch.span_sums(ResponseLogProbs(model)(batch))
    return Spans(sums[::2], sums[1::2], batch.counts[::2], batch.counts[1::2])


def score_pairs(model: Any, batch: Batch) -> tuple[Spans, Spans]:
    prompts = [pair.prompt for pair in batch.pairs]
    chosen = score(model, prompts, [pair.chosen for pair in batch.pairs])
    return chosen, score(model, prompts, [pair.rejected for pair in batch.pairs])


def orpo(batch: Batch, weight: float, scope: str, reduction: str) -> Tensor:
    """`reduction` is "tokens", the mean over the batch's, or "pairs", that of each pair's mean."""
    chosen, rejected = score_pairs(batch.student, batch)
    nll, tokens = -chosen.answers, chosen.answer_tokens
    if scope == "full":
        nll, tokens = nll - chosen.prompts, tokens + chosen.prompt_tokens
    nll = nll.sum() / tokens.sum() if reduction == "tokens" else (nll / tokens).mean()
    means = [mean_log_probability(x.answers, x.answer_tokens) for x in (chosen, rejected)]
    return nll + weight * odds_ratio_loss(*means).mean()


def dadpo(batch: Batch, beta1: float, beta2: float) -> Tensor:
    models = batch.student, batch.reference, batch.teacher
    sums = [spans.answers for model in models for spans in score_pairs(model, batch)]
    return dadpo_loss(*sums, beta1, beta2).mean()


def mixed_reference(batch: Batch, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Sums of chosen and rejected under the mixture with which DPO is daDPO."""
    with torch.no_grad():
        scored = [score_pairs(model, batch) for model in (batch.reference, batch.teacher)]
    mixed = [
        (beta1 * reference.answers + beta2 * teacher.answers) / (beta1 + beta2)
        for reference, teacher in zip(*scored, strict=True)
    ]
    return mixed[0], mixed[1]


def kl_estimate(batch: Batch) -> Tensor:
    """KTO's: the mean log-ratio of answers that were moved to another row's prompt."""
    prompts = [answer.prompt for answer in batch.answers]
    moved = [answer.moved for answer in batch.answers]
    policy, reference = (score(m, prompts, moved) for m in (batch.student, batch.reference))
    return (policy.answers - reference.answers).mean()


def kto(batch: Batch, beta: float, weights: tuple[float, float]) -> Tensor:
    prompts = [answer.prompt for answer in batch.answers]
    ids = [answer.ids for answer in batch.answers]
    policy, reference = (score(m, prompts, ids).answers for m in (batch.student, batch.reference))
    desirable = torch.tensor([answer.desirable for answer in batch.answers])
    return kto_loss(policy, reference, desirable, kl_estimate(batch), beta, *weights).mean()


def kl_per_token(batch: Batch, direction: str) -> Tensor:
    """The mean over all tokens of the chosen answers."""
    inputs, labels = padded([(pair.prompt, pair.chosen) for pair in batch.pairs])
    logits = [model(**inputs).logits[:, :-1] for model in (batch.student, batch.teacher)]
    mask = labels[:, 1:] != IGNORED
    return (token_kl(*logits, mask, direction) * mask.sum(-1)).sum() / mask.sum()
