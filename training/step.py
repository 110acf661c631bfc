"""One optimizer step's losses: summed over micro-batches, divided once by global counts."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.sections import Training
from pipeline.logprobs import Row, TokenBatch, collate
from training.batches import BatchCounts, MicroBatch, TokenPair
from training.losses import (
    cap_gradient,
    contrast_figures,
    mean_log_probability,
    odds_ratio_loss,
    rejected_gradient,
)

# Sums over pairs that a step reports.
SUMS = (
    "nll",
    "odds_ratio",
    "margin",
    "accuracy",
    "chosen_logp",
    "rejected_logp",
    "contrasted",
    "capped",
    "cut",
    "tokens",
    "positions",
)


@dataclass(frozen=True)
class Totals:
    """A worker's figures of one step: workers add up the sums and keep the largest gradient."""

    sums: Tensor  # float64, one for each of SUMS
    largest_gradient: Tensor  # float64, of the odds-ratio loss to a negative's log-probability


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch as tensors, and which spans are the pairs' parts."""

    tokens: TokenBatch
    prompts: list[int]  # spans of the prompts, one a pair
    chosen: list[int]  # one a pair
    contrasted: list[int]  # indices of pairs that have a negative
    rejected: list[int]  # spans of the negatives, one for each of `contrasted`


def collate_pairs(
    pairs: Sequence[TokenPair], pad_id: int, share_prompts: bool, score_prompt: bool
) -> PairBatch:
    """Rows [prompt | chosen | rejected], or a row for each response without `share_prompts`."""
    rows: list[Row] = []
    prompts, chosen, contrasted, rejected = [], [], [], []
    spans = 0
    for index, pair in enumerate(pairs):
        together = share_prompts and pair.rejected is not None
        responses = [pair.chosen, pair.rejected or []] if together else [pair.chosen]
        rows.append(Row(pair.prompt, responses, score_prompt))
        prompts.append(spans)
        chosen.append(spans + 1)
        spans += 1 + len(responses)
        if pair.rejected is not None:
            contrasted.append(index)
            if not together:
                rows.append(Row(pair.prompt, [pair.rejected]))
                spans += 2
            rejected.append(spans - 1)
    return PairBatch(collate(rows, pad_id), prompts, chosen, contrasted, rejected)


def pair_losses(
    token_logps: Tensor, batch: PairBatch, counts: BatchCounts, training: Training
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the global batch's loss (a scalar), and its detached figures.

    The loss is NLL / nll_tokens + odds_ratio_weight * contrast / pairs, both counts being those of
    the global batch, so that the parts of all micro-batches and workers add up to its loss. A pair
    without a negative adds 0 to the contrast and counts.
    """
    sums = batch.tokens.span_sums(token_logps)
    nll = -(sums[batch.chosen].sum() + sums[batch.prompts].sum())
    means = mean_log_probability(sums, batch.tokens.counts)
    chosen, rejected = means[batch.chosen], means[batch.rejected]
    opposite, cap = chosen[batch.contrasted], training.odds_gradient_cap
    figures = contrast_figures(opposite, rejected)
    gradient = rejected_gradient(opposite, rejected)
    if cap is not None:
        rejected = cap_gradient(rejected, gradient, cap)
    odds_ratio = odds_ratio_loss(opposite, rejected).sum()
    loss = nll / counts.nll_tokens + training.odds_ratio_weight * odds_ratio / counts.pairs
    figures["chosen_logp"] = chosen.detach()
    totals = {name: values.sum() for name, values in figures.items()}
    totals |= {"nll": nll.detach(), "odds_ratio": odds_ratio.detach()}
    totals["capped"] = (gradient > (math.inf if cap is None else cap)).sum()
    totals["largest_gradient"] = gradient.max() if len(gradient) else gradient.sum()
    return loss, totals


def accumulate(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    counts: BatchCounts,
    training: Training,
    collator: Callable[[Sequence[TokenPair]], PairBatch],
    backward: Callable[[Tensor, MicroBatch], None],
) -> Totals:
    """Run forward and backward over a worker's micro-batches.

    `backward` gets each part of the loss and sends it back; gradients add up to those of the
    global batch's loss, over this worker's share.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for micro in micro_batches:
        batch = collator(micro.pairs)
        on_device = PairBatch(**(vars(batch) | {"tokens": batch.tokens.to(device)}))
        loss, figures = pair_losses(model(on_device.tokens), on_device, counts, training)
        backward(loss * 0 if micro.filler else loss, micro)
        if not micro.filler:
            figures |= _sizes(batch, micro)
            sums += torch.stack([figures[name].to(device, torch.float64) for name in SUMS])
            largest = torch.maximum(largest, figures["largest_gradient"])
    return Totals(sums.cpu(), largest.cpu())


def _sizes(batch: PairBatch, micro: MicroBatch) -> dict[str, Tensor]:
    sizes = {
        "contrasted": len(batch.contrasted),
        "cut": sum(pair.cut for pair in micro.pairs),
        "tokens": batch.tokens.tokens,
        "positions": batch.tokens.positions_computed,
    }
    return {name: torch.tensor(size) for name, size in sizes.items()}


def describe_step(totals: Totals, counts: BatchCounts, training: Training) -> dict[str, float]:
    """The figures of a step from totals that are reduced over all workers."""
    total = dict(zip(SUMS, totals.sums.tolist(), strict=True))
    contrasted = max(total["contrasted"], 1)
    nll, odds_ratio = total["nll"] / counts.nll_tokens, total["odds_ratio"] / counts.pairs
    return {
        "loss": nll + training.odds_ratio_weight * odds_ratio,
        "nll": nll,
        "odds_ratio": odds_ratio,
        "margin": total["margin"] / contrasted,
        "accuracy": total["accuracy"] / contrasted,
        "chosen_logp": total["chosen_logp"] / counts.pairs,
        "rejected_logp": total["rejected_logp"] / contrasted,
        "padding": 1 - total["tokens"] / total["positions"],
        "without_negative": counts.pairs - total["contrasted"],
        "largest_gradient": float(totals.largest_gradient),
        "capped": total["capped"],
        "cut": total["cut"],
        "tokens": total["tokens"],
    }
