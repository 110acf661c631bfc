"""From pairs to micro-batches: ids, order, and who takes what.

What a global batch holds, and in which order batches come, follows from (seed, epoch) alone; the
number of workers and the size of a micro-batch only cut the same batch into other pieces.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from cluster.errors import BadInputError
from pipeline.rows import Pair
from pipeline.scoring import Answered


class Tokens(Protocol):
    """What of pipeline.chat.Chat is needed here."""

    def prompt_ids(self, user_message: str) -> list[int]:
        """Ids of the rendered prompt."""

    def response_ids(self, text: str, finished: bool) -> list[int]:
        """Ids of a response, closed by the end-of-turn token if finished."""


@dataclass(frozen=True)
class Anchors:
    """Log-probabilities of whole responses (nats) under models that do not train.

    0 where the method does not ask for them, or there is no such response.
    """

    reference_chosen: float = 0.0
    reference_rejected: float = 0.0
    reference_unrelated: float = 0.0
    teacher_chosen: float = 0.0
    teacher_rejected: float = 0.0


_NO_ANCHORS = Anchors()


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids; chosen and rejected share the prompt's to the letter."""

    prompt_id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None  # None: only the NLL of `chosen` applies
    cut: int = 0  # responses that max_length cut
    unrelated: list[int] | None = None  # another prompt's answer, for KTO's estimate of the KL
    anchors: Anchors = _NO_ANCHORS
    for_teacher: list[int] | None = None  # the prompt as the teacher of a KL reads it

    @property
    def length(self) -> int:
        """Tokens of the pair with its prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected or ())


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that one worker takes through the model at once.

    `filler` marks pairs that count nothing: every worker must run as many micro-batches as the
    others, and in a last, partial batch there may be no pair left for it.
    """

    pairs: tuple[TokenPair, ...]
    filler: bool = False


@dataclass(frozen=True)
class BatchCounts:
    """What a global batch's sums are divided by."""

    nll_tokens: int
    pairs: int  # with or without a negative
    answers: int  # chosen and rejected ones together


def tokenize_pair(
    pair: Pair,
    chat: Tokens,
    max_length: int,
    contrast: bool,
    unrelated: Answered | None = None,
    anchors: Anchors = _NO_ANCHORS,
    for_teacher: list[int] | None = None,
) -> TokenPair:
    """Ids of a pair, each response cut so that prompt and response fit in `max_length` tokens.

    A cut loses the end-of-turn token, as it comes last. Without `contrast` the negative is left
    out. Raises BadInputError for a prompt that leaves no room for a response.
    """
    prompt = chat.prompt_ids(pair.prompt)
    room = max_length - len(prompt)
    if room < 1:
        raise BadInputError(
            f"prompt {pair.prompt_id} has {len(prompt)} tokens, expected fewer than "
            f"training.max_length={max_length}: raise it, or leave the prompt out"
        )
    chosen = chat.response_ids(pair.chosen, pair.chosen_finished)
    rejected = None
    if contrast and pair.rejected is not None:
        rejected = chat.response_ids(pair.rejected, bool(pair.rejected_finished))
    cut = sum(len(ids) > room for ids in (chosen, rejected or []))
    # An empty trace that was cut leaves nothing to contrast with.
    rejected = (rejected or [])[:room] or None
    other = chat.response_ids(unrelated.response, unrelated.finished)[:room] if unrelated else None
    return TokenPair(
        pair.prompt_id, prompt, chosen[:room], rejected, cut, other, anchors, for_teacher
    )


def global_batches(
    pairs: int, size: int, seed: int, epoch: int, steps: int | None = None
) -> list[list[int]]:
    """The epoch's batches, as indices into its pairs, in an order that follows from (seed, epoch).

    Every pair comes once, and the last batch may be smaller. With `steps` there are so many whole
    batches, for which the pairs come again in new orders, or only some of them do.
    """
    shuffling, order = random.Random(f"{seed}/{epoch}"), list[int]()
    wanted = pairs if steps is None else steps * size
    while len(order) < wanted:
        again = list(range(pairs))
        shuffling.shuffle(again)
        order += again
    return [order[start : min(start + size, wanted)] for start in range(0, wanted, size)]


def count_batch(pairs: Sequence[TokenPair], score_prompt: bool) -> BatchCounts:
    """Counts of a global batch; with `score_prompt` all prompt tokens but the first count."""
    prompt_tokens = sum(len(pair.prompt) - 1 for pair in pairs) if score_prompt else 0
    answers = sum(1 + (pair.rejected is not None) for pair in pairs)
    tokens = prompt_tokens + sum(len(pair.chosen) for pair in pairs)
    return BatchCounts(tokens, len(pairs), answers)


def micro_batches(
    pairs: Sequence[TokenPair], micro_batch: int, workers: int, rank: int
) -> list[MicroBatch]:
    """The share of worker `rank` in a global batch.

    Pairs of like length go together, which saves padding, and the workers' n-th micro-batches are
    of like length, which saves waiting. All workers get the same number of micro-batches.
    """
    ordered = sorted(pairs, key=lambda pair: pair.length, reverse=True)
    steps = -(-len(ordered) // (micro_batch * workers))
    groups = _split_evenly(ordered, steps * workers)
    shortest = ordered[-1]
    return [
        MicroBatch(tuple(group)) if group else MicroBatch((shortest,), filler=True)
        for group in groups[rank::workers]
    ]


def _split_evenly(pairs: Sequence[TokenPair], groups: int) -> list[Sequence[TokenPair]]:
    share, extra = divmod(len(pairs), groups)
    bounds = [number * share + min(number, extra) for number in range(groups + 1)]
    return [pairs[start:stop] for start, stop in pairwise(bounds)]
