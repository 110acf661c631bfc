"""One optimizer step: micro-batches as tensors, sums over them, and what a step reports."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.logprobs import Row, collate
from training.batches import Anchors, MicroBatch, TokenPair
from training.objectives import Objective, PairBatch

_LARGEST = "largest_gradient"  # workers keep the largest, and add up all else
_OF_CONTRASTED = (  # means over pairs that have a negative
    "margin",
    "accuracy",
    "rejected_logp",
    "reward_chosen",
    "reward_rejected",
    "teacher_term",
)


@dataclass
class Totals:
    """A worker's figures of one step, by name: float64 scalars, on the CPU once reduced."""

    figures: dict[str, Tensor] = field(default_factory=dict)

    def add(self, figures: dict[str, Tensor]) -> None:
        """Count a micro-batch's."""
        for name, value in figures.items():
            value = value.detach().double()
            join = torch.maximum if name == _LARGEST else torch.add
            before = self.figures.get(name)
            self.figures[name] = value if before is None else join(before, value)

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Make them those of all workers of `group`, who have the same names."""
        # Not before: each copy from a GPU waits for all that it has to do.
        self.figures = {name: value.cpu() for name, value in self.figures.items()}
        if _LARGEST in self.figures:
            dist.all_reduce(self.figures[_LARGEST], dist.ReduceOp.MAX, group=group)
        names = sorted(self.figures.keys() - {_LARGEST})
        sums = torch.stack([self.figures[name] for name in names])
        dist.all_reduce(sums, group=group)
        self.figures |= dict(zip(names, sums, strict=True))


def collate_pairs(
    pairs: Sequence[TokenPair],
    pad_id: int,
    share_prompts: bool,
    score_prompt: bool,
    with_teacher: bool = False,
) -> PairBatch:
    """Rows [prompt | chosen | rejected], or a row for each response without `share_prompts`.

    `with_teacher` adds rows [its prompt | chosen] for one that is compared token by token.
    """
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
    taught = [Row(pair.for_teacher or pair.prompt, [pair.chosen]) for pair in pairs]
    return PairBatch(
        collate(rows, pad_id),
        prompts,
        chosen,
        contrasted,
        rejected,
        _anchors(pairs),
        collate(taught, pad_id) if with_teacher else None,
    )


def _anchors(pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
    given = [asdict(pair.anchors) for pair in pairs]
    return {
        name: torch.tensor([values[name] for values in given], dtype=torch.float64)
        for name in asdict(Anchors())
    }


def accumulate(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    objective: Objective,
    collator: Callable[[Sequence[TokenPair]], PairBatch],
    backward: Callable[[Tensor, MicroBatch], None],
) -> Totals:
    """Run forward and backward over a worker's micro-batches.

    `backward` gets each part of the loss and sends it back; gradients add up to those of the
    global batch's loss, over this worker's share.
    """
    device = next(model.parameters()).device
    totals = Totals()
    for micro in micro_batches:
        batch = collator(micro.pairs)
        loss, figures = objective.loss(model, batch.to(device))
        backward(loss * 0 if micro.filler else loss, micro)
        figures |= _sizes(batch, micro)
        totals.add({n: value * 0 for n, value in figures.items()} if micro.filler else figures)
    return totals


def _sizes(batch: PairBatch, micro: MicroBatch) -> dict[str, Tensor]:
    sizes = {
        "contrasted": len(batch.contrasted),
        "cut": sum(pair.cut for pair in micro.pairs),
        "tokens": batch.tokens.tokens,
        "positions": batch.tokens.positions_computed,
    }
    return {name: torch.tensor(size) for name, size in sizes.items()}


def log_ratio_to_unrelated(
    model: nn.Module, micro_batches: Iterable[MicroBatch], pad_id: int
) -> Tensor:
    """KTO's estimate of the KL before its division: a worker's sum over pairs (nats, a scalar).

    The sum of log policy(y') - log reference(y') with y' an answer to another prompt (arXiv:
    2402.01306, section 4.1). Without gradients.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    for micro in micro_batches:
        rows = [Row(pair.prompt, [pair.unrelated or []]) for pair in micro.pairs]
        batch = collate(rows, pad_id)
        with torch.no_grad():
            logps = model(batch.to(device)).double().cpu()
        policy = batch.span_sums(logps).sum()
        reference = sum(pair.anchors.reference_unrelated for pair in micro.pairs)
        total += 0 if micro.filler else policy - reference
    return total


def describe_step(totals: Totals, objective: Objective) -> dict[str, float]:
    """The figures of a step from totals that are reduced over all workers."""
    found = {name: value.item() for name, value in totals.figures.items()}
    counts, contrasted = objective.counts, found.pop("contrasted")
    padding = 1 - found["tokens"] / found.pop("positions")
    divisors = _divisors(objective, max(contrasted, 1))
    return {
        **{name: value / divisors.get(name, 1) for name, value in found.items()},
        "padding": padding,
        "without_negative": counts.pairs - contrasted,
    }


def _divisors(objective: Objective, contrasted: float) -> dict[str, float]:
    counts, training = objective.counts, objective.training
    return {
        "nll": counts.nll_tokens if training.nll_reduction == "tokens" else counts.pairs,
        "preference": counts.answers if training.method == "kto" else counts.pairs,
        **dict.fromkeys(("odds_ratio", "kl", "chosen_logp"), counts.pairs),
        **dict.fromkeys(_OF_CONTRASTED, contrasted),
    }
