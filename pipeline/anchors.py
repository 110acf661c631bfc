"""What reference and teacher are asked about an epoch's pairs, for daDPO and KTO.

Both score text. Pairs that are too long for training are therefore cut as text, before anyone
scores them, so that all models speak of the same words.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cluster.config import RunConfig
from pipeline.chat import Chat
from pipeline.rows import Pair
from pipeline.scoring import Answered


def chosen_answer(pair: Pair) -> Answered:
    """The right side of a pair."""
    return Answered(pair.prompt, pair.chosen, pair.chosen_finished)


def rejected_answer(pair: Pair) -> Answered | None:
    """The wrong side of a pair, where it has one."""
    if pair.rejected is None:
        return None
    return Answered(pair.prompt, pair.rejected, bool(pair.rejected_finished))


def unrelated_answers(pairs: Sequence[Pair], chat: Chat, max_length: int) -> list[Answered]:
    """For each pair its prompt, answered by the chosen answer to another: KTO's way to the KL.

    Pairs of a prompt follow one another, so the answer is taken from as many pairs further on as
    the prompt with the most pairs has.
    """
    most = max(Counter(pair.prompt_id for pair in pairs).values())
    others = [pairs[(index + most) % len(pairs)] for index in range(len(pairs))]
    return [
        fit(replace(chosen_answer(other), message=pair.prompt), chat, max_length)
        for pair, other in zip(pairs, others, strict=True)
    ]


def fit(answered: Answered, chat: Chat, max_length: int) -> Answered:
    """The text, cut so that it and its prompt take at most `max_length` tokens of `chat`."""
    ids = chat.response_ids(answered.response, answered.finished)
    room = max(0, max_length - len(chat.prompt_ids(answered.message)))
    if len(ids) <= room:
        return answered
    # A cut within a character, or through a merge, may take more tokens when it is read again.
    for kept in range(room, -1, -1):
        cut = chat.tokenizer.decode(ids[:kept], skip_special_tokens=True)
        if len(chat.response_ids(cut, finished=False)) <= room:
            break
    return replace(answered, response=cut, finished=False)


def fit_pairs(pairs: Iterable[Pair], chat: Chat, max_length: int) -> list[Pair]:
    """The pairs with both sides cut as text to what training takes."""
    fitting = []
    for pair in pairs:
        chosen, rejected = fit(chosen_answer(pair), chat, max_length), rejected_answer(pair)
        pair = replace(pair, chosen=chosen.response, chosen_finished=chosen.finished)
        if rejected is not None:
            wrong = fit(rejected, chat, max_length)
            pair = replace(pair, rejected=wrong.response, rejected_finished=wrong.finished)
        fitting.append(pair)
    return fitting


def asked_of(
    reader: str, pairs: Sequence[Pair], config: RunConfig, student: Chat
) -> list[Answered]:
    """The texts that "reference" or "teacher" scores, each once."""
    sides = [side for pair in pairs for side in (chosen_answer(pair), rejected_answer(pair))]
    texts = [side for side in sides if side is not None]
    if config.training.method == "kto" and reader == "reference":
        texts += unrelated_answers(pairs, student, config.training.max_length)
    return list(dict.fromkeys(texts))
