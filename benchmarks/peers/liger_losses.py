"""Liger's losses on a batch: `liger_kernel.chunked_loss`, from the last hidden states on.

`compiled=False` leaves out torch.compile, not a step of the computation.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.batch import IGNORED, Batch, padded
from benchmarks.peers.our_losses import kl_estimate


def orpo(batch: Batch, weight: float, scope: str) -> Tensor:
    """NLL of the chosen answers, with `nll_target` of their prompts too: the mean over tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    hidden, labels, ids = _states(batch.student, _rows(batch))
    whole = {"nll_target": ids} if scope == "full" else {}
    loss = LigerFusedLinearORPOLoss(beta=weight, compiled=False)
    return loss(batch.student.lm_head.weight, hidden, labels, **whole)[0]


def orpo_one_by_one(batch: Batch, weight: float, scope: str) -> Tensor:
    """The mean over batches of a single pair."""
    return torch.stack([orpo(single, weight, scope) for single in batch.one_by_one()]).mean()


def dpo(batch: Batch, beta: float) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, labels, _ = _states(batch.student, _rows(batch))
    reference = _states(batch.reference, _rows(batch))[0].detach()
    loss = LigerFusedLinearDPOLoss(beta=beta, compiled=False)
    return loss(
        batch.student.lm_head.weight,
        hidden,
        labels,
        ref_input=reference,
        ref_weight=batch.reference.lm_head.weight,
    )[0]


def kto(batch: Batch, beta: float) -> Tensor:
    """With our estimate of the KL, cut off at 0: Liger takes it as it is given."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    rows = [(answer.prompt, answer.ids) for answer in batch.answers]
    hidden, labels, _ = _states(batch.student, rows)
    loss = LigerFusedLinearKTOLoss(beta=beta, compiled=False, use_ref_model=True)
    return loss(
        hidden,
        batch.student.lm_head.weight,
        labels,
        preference_labels=torch.tensor([answer.desirable for answer in batch.answers]),
        ref_input=_states(batch.reference, rows)[0].detach(),
        ref_weight=batch.reference.lm_head.weight,
        kl=kl_estimate(batch).detach().clamp(min=0),
    )[0]


def _rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    chosen = [(pair.prompt, pair.chosen) for pair in batch.pairs]
    return chosen + [(pair.prompt, pair.rejected) for pair in batch.pairs]


def _states(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the answers' labels, and the labels of all tokens, each moved by one."""
    inputs, labels = padded(rows)
    hidden = model.get_decoder()(**inputs).last_hidden_state[:, :-1]
    whole = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    return hidden, labels[:, 1:], whole[:, 1:]
