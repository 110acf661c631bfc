"""The mixed policy: which negative each positive is paired with, epoch by epoch.

ORPO-Distill (arXiv:2509.25100), section on mixed-policy updates.
"""

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal

from cluster.sections import Pairs
from pipeline.diversity import similarity
from pipeline.rows import Pair, Trace

Pool = Mapping[str, Sequence[Trace]]
Manner = Literal["uniform", "similar", "recent"]
_FADING = 0.5  # what a trace weighs in "recent", beside one of a student that is an epoch younger


@dataclass(frozen=True)
class Pools:
    """Kept traces by prompt id: positives P, negatives N_0, and those of later students.

    `later` holds the latest student's N_e first, then those of earlier ones where they are drawn.
    """

    positives: Pool
    base: Pool
    later: Sequence[Pool] = ()


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
    manner: Manner = "uniform",
) -> list[Pair]:
    """Pair every kept positive with a drawn negative of its prompt, or with none.

    From the second epoch on each negative comes from a later student with probability `phi`, else
    from the base pool. An empty later pool falls back to the base pool where phi < 1, flagged; any
    other empty pool leaves the pair without a negative. `manner` says how a pool is drawn from:
    "uniform", the most "similar" to the positive (ROUGE-L), or all later students' traces with more
    weight on "recent" ones. `messages` are the prompts' texts by id; prompts without a positive are
    left out. The draws depend on seed, epoch and prompt alone.
    """
    pairs = []
    for prompt_id in sorted(messages.keys() & pools.positives.keys()):
        random = Random(f"{seed}/{epoch}/{prompt_id}")
        for positive in list(pools.positives[prompt_id])[:positives_per_prompt]:
            # Both numbers are always drawn, so that the first epoch is the same for every phi.
            coin, place = random.random(), random.random()
            from_later = draws_from_latest(epoch, phi) and coin < phi
            base = _equal(pools.base.get(prompt_id, ()))
            candidates = _later(pools, prompt_id, manner) if from_later else base
            fallback = from_later and not candidates and phi < 1 and bool(base)
            negative = _choose(base if fallback else candidates, positive, place, manner)
            pairs.append(_pair(messages[prompt_id], positive, negative, fallback))
    return pairs


Weighted = list[tuple[Trace, float]]


def _equal(traces: Iterable[Trace]) -> Weighted:
    return [(trace, 1.0) for trace in traces]


def _later(pools: Pools, prompt_id: str, manner: Manner) -> Weighted:
    return [
        (trace, _FADING**age)
        for age, traces in enumerate(pools.later if manner == "recent" else pools.later[:1])
        for trace in traces.get(prompt_id, ())
    ]


def _choose(candidates: Weighted, positive: Trace, place: float, manner: Manner) -> Trace | None:
    """The most similar of `candidates`, or the one at `place` (0 to 1) along their weights."""
    if not candidates:
        return None
    if manner == "similar":
        return max(
            (trace for trace, _ in candidates), key=lambda t: similarity(positive.text, t.text)
        )
    ends = list(accumulate(weight for _, weight in candidates))
    return candidates[bisect(ends, place * ends[-1], hi=len(ends) - 1)][0]


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
    """One epoch's pairs by where their negatives came from; the five add up to `pairs`."""

    pairs: int
    from_latest: int  # of the student after the epoch before
    from_base: int  # of the base student, drawn
    fallbacks: int  # of the base student, because the latest had none
    without_negative: int  # only the NLL applies
    from_teacher: int = 0  # in the base student's place


def count_pairs(pairs: Sequence[Pair], wanted: Pairs) -> PairCounts:
    """Count pairs of one epoch. In the first epoch the base student is the latest: from_base."""
    latest = sum(bool(pair.rejected_epoch) for pair in pairs)
    fallbacks = sum(pair.rejected_fallback for pair in pairs)
    none = sum(pair.rejected is None for pair in pairs)
    rest = len(pairs) - latest - fallbacks - none
    of_teacher = rest if wanted.negatives_from == "teacher" else 0
    return PairCounts(len(pairs), latest, rest - of_teacher, fallbacks, none, of_teacher)
