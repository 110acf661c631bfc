"""Our losses on a batch, by what training itself minimises: the objective of a configuration."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.batch import IGNORED, PAD, Batch, padded
from cluster.sections import Training
from pipeline.logprobs import ResponseLogProbs, Row, collate
from training.batches import Anchors, TokenPair, count_batch
from training.losses import token_kl
from training.objectives import Objective
from training.step import collate_pairs


def score(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Sums of the log-probabilities of answers, [B]."""
    rows = [Row(prompt, [ids]) for prompt, ids in zip(prompts, answers, strict=True)]
    batch = collate(rows, PAD)
    return batch.span_sums(ResponseLogProbs(model)(batch))[1::2]


def score_pairs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Those of chosen and of rejected answers."""
    prompts = [pair.prompt for pair in batch.pairs]
    chosen = score(model, prompts, [pair.chosen for pair in batch.pairs])
    return chosen, score(model, prompts, [pair.rejected for pair in batch.pairs])


def loss_of(training: Training, batch: Batch, estimate: Tensor | None = None) -> Tensor:
    """What training minimises of the batch, all of it in one micro-batch on one worker.

    `estimate` is KTO's, of the KL.
    """
    full, anchors = training.nll_scope == "full", anchors_of(batch)
    pairs = [
        TokenPair(str(place), pair.prompt, pair.chosen, pair.rejected, anchors=anchors[place])
        for place, pair in enumerate(batch.pairs)
    ]
    collated = collate_pairs(pairs, PAD, share_prompts=True, score_prompt=full)
    objective = Objective(training, count_batch(pairs, full), estimate)
    return objective.loss(ResponseLogProbs(batch.student), collated)[0]


def anchors_of(batch: Batch) -> list[Anchors]:
    """What the models that do not train say of each pair."""
    with torch.no_grad():
        scored = [score_pairs(model, batch) for model in (batch.reference, batch.teacher)]
    sums = [answers.tolist() for pair in scored for answers in pair]
    return [
        Anchors(reference_chosen=a, reference_rejected=b, teacher_chosen=c, teacher_rejected=d)
        for a, b, c, d in zip(*sums, strict=True)
    ]


def orpo(batch: Batch, weight: float, scope: Any, reduction: Any) -> Tensor:
    modes = {"nll_scope": scope, "nll_reduction": reduction}
    return loss_of(Training(method="orpo", odds_ratio_weight=weight, **modes), batch)


def dadpo(batch: Batch, beta1: float, beta2: float) -> Tensor:
    betas = {"reference_weight": beta1, "teacher_weight": beta2}
    return loss_of(Training(method="dadpo", **betas), batch)


def mixed_reference(batch: Batch, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Sums of chosen and rejected under the mixture with which DPO is daDPO."""
    with torch.no_grad():
        scored = [score_pairs(model, batch) for model in (batch.reference, batch.teacher)]
    mixed = [
        (beta1 * reference + beta2 * teacher) / (beta1 + beta2)
        for reference, teacher in zip(*scored, strict=True)
    ]
    return mixed[0], mixed[1]


def kl_estimate(batch: Batch) -> Tensor:
    """KTO's: the mean log-ratio of answers that were moved to another row's prompt."""
    prompts = [answer.prompt for answer in batch.answers]
    moved = [answer.moved for answer in batch.answers]
    policy, reference = (score(m, prompts, moved) for m in (batch.student, batch.reference))
    return (policy - reference).mean()


def kto(batch: Batch, beta: float, weights: tuple[float, float]) -> Tensor:
    weighed = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    training = Training(method="kto", reference_weight=beta, **weighed)
    return loss_of(training, batch, kl_estimate(batch))


def kl_per_token(batch: Batch, direction: str) -> Tensor:
    """The mean over all tokens of the chosen answers."""
    inputs, labels = padded([(pair.prompt, pair.chosen) for pair in batch.pairs])
    logits = [model(**inputs).logits[:, :-1] for model in (batch.student, batch.teacher)]
    mask = labels[:, 1:] != IGNORED
    return (token_kl(*logits, mask, direction) * mask.sum(-1)).sum() / mask.sum()
