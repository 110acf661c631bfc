"""Several teachers: which of their traces make up the one pool of positives."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.diversity import keep_diverse
from pipeline.pairs import pool
from pipeline.rows import Trace


def pool_teachers(
    traces: Mapping[str, Sequence[Trace]],
    traces_per_prompt: Mapping[str, int | None],
    max_rouge_l: float,
) -> dict[str, list[Trace]]:
    """Of each teacher, by name, the traces that enter the pool, teacher after teacher.

    A kept trace enters unless it is a near-copy of one of its prompt that has entered before, or
    its teacher has as many there as `traces_per_prompt` allows it.
    """
    pooled: dict[str, list[Trace]] = defaultdict(list)
    entered: dict[str, list[Trace]] = {name: [] for name in traces}
    for name, own in traces.items():
        for prompt_id, kept in pool(own).items():
            new = _unlike(pooled[prompt_id], kept, max_rouge_l)[: traces_per_prompt[name]]
            pooled[prompt_id] += new
            entered[name] += new
    return entered


def _unlike(before: list[Trace], traces: list[Trace], max_rouge_l: float) -> list[Trace]:
    """The traces that are no near-copies of those before; among themselves they are diverse."""
    if not before:
        return traces
    candidates = [*before, *traces]
    diverse = keep_diverse([trace.text for trace in candidates], max_rouge_l)
    return [candidates[place] for place in diverse if place >= len(before)]
