"""The mixed policy: which negative each positive is paired with, epoch by epoch.

ORPO-Distill (arXiv:2509.25100), section on mixed-policy updates.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from pipeline.rows import Pair, Trace

Pool = Mapping[str, Sequence[Trace]]


@dataclass(frozen=True)
class Pools:
    """Kept traces by prompt id: positives P, the base student's N_0, the latest student's N_e."""

    positives: Pool
    base: Pool
    latest: Pool


def pool(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """The kept traces of each prompt, in sampling order."""
    found: dict[str, list[Trace]] = defaultdict(list)
    for trace in traces:
        if trace.kept:
            found[trace.prompt_id].append(trace)
    return dict(found)


def draws_from_latest(epoch: int, phi: float) -> bool:
    """Whether the pairs of `epoch` (1, 2, ...) may hold a negative of the student before it."""
    return epoch > 1 and phi > 0


def draw_pairs(
    messages: Mapping[str, str],
    pools: Pools,
    epoch: int,
    phi: float,
    seed: int,
    positives_per_prompt: int | None = None,
) -> list[Pair]:
    """Pair every kept positive with a uniformly drawn negative of its prompt, or with none.

    From the second epoch on each negative comes from the latest pool with probability `phi`, else
    from the base pool. An empty latest pool falls back to the base pool where phi < 1, flagged;
    any other empty pool leaves the pair without a negative. `messages` are the prompts' texts by
    id; prompts without a positive are left out. The draws depend on seed, epoch and prompt alone.
    """
    pairs = []
    for prompt_id in sorted(messages.keys() & pools.positives.keys()):
        random = Random(f"{seed}/{epoch}/{prompt_id}")
        for positive in list(pools.positives[prompt_id])[:positives_per_prompt]:
            negative, fallback = _draw(pools, prompt_id, epoch, phi, random)
            pairs.append(_pair(messages[prompt_id], positive, negative, fallback))
    return pairs


def _draw(
    pools: Pools, prompt_id: str, epoch: int, phi: float, random: Random
) -> tuple[Trace | None, bool]:
    # Both numbers are always drawn, so that the first epoch is the same for every phi.
    coin, place = random.random(), random.random()
    from_latest = draws_from_latest(epoch, phi) and coin < phi
    candidates = (pools.latest if from_latest else pools.base).get(prompt_id, ())
    fallback = from_latest and not candidates and phi < 1
    if fallback:
        candidates = pools.base.get(prompt_id, ())
    if not candidates:
        return None, False
    return candidates[int(place * len(candidates))], fallback


def _pair(message: str, positive: Trace, negative: Trace | None, fallback: bool) -> Pair:
    return Pair(
        prompt_id=positive.prompt_id,
        prompt=message,
        chosen=positive.text,
        rejected=negative.text if negative else None,
        chosen_model=positive.model,
        chosen_epoch=positive.epoch,
        rejected_model=negative.model if negative else None,
        rejected_epoch=negative.epoch if negative else None,
        rejected_fallback=fallback,
        chosen_finished=positive.finish_reason == "stop",
        rejected_finished=negative.finish_reason == "stop" if negative else None,
    )


@dataclass(frozen=True)
class PairCounts:
    """One epoch's pairs by where their negatives came from; the four add up to `pairs`."""

    pairs: int
    from_latest: int  # of the student after the epoch before
    from_base: int  # of the base student, drawn
    fallbacks: int  # of the base student, because the latest had none
    without_negative: int  # only the NLL applies


def count_pairs(pairs: Sequence[Pair]) -> PairCounts:
    """Count pairs of one epoch. In the first epoch the base student is the latest: from_base."""
    latest = sum(bool(pair.rejected_epoch) for pair in pairs)
    fallbacks = sum(pair.rejected_fallback for pair in pairs)
    none = sum(pair.rejected is None for pair in pairs)
    return PairCounts(len(pairs), latest, len(pairs) - latest - fallbacks - none, fallbacks, none)
