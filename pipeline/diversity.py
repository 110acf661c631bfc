"""Dropping near-duplicates among the traces of one prompt (arXiv:2509.25100: ROUGE-L at most 0.80).

ROUGE-L is the F1 of rouge-score's "rougeL" with its default tokenizer and no stemmer: lower-case
runs of a-z and 0-9. That tokenizer drops operators and every script but ASCII Latin, so
"3 + 5" equals "3 - 5", and two texts in Cyrillic score 0 however alike. Texts that are the same to
the letter therefore score 1 here, whatever their script.
"""

from collections.abc import Sequence

from rapidfuzz.distance import LCSseq
from rouge_score.tokenize import tokenize


def keep_diverse(texts: Sequence[str], max_rouge_l: float = 0.8) -> list[int]:
    """Indices of the texts to keep, in order: each scores at most `max_rouge_l` to all kept before.

    With `max_rouge_l` 1 everything is kept.
    """
    tokens = _numbered(texts)
    kept: list[int] = []
    for index, text in enumerate(texts):
        alike = (
            (text == texts[other] and max_rouge_l < 1)
            or rouge_l(tokens[other], tokens[index]) > max_rouge_l
            for other in kept
        )
        if not any(alike):
            kept.append(index)
    return kept


def similarity(target: str, prediction: str) -> float:
    """ROUGE-L F1 of two texts, in [0, 1]."""
    return rouge_l(*_numbered([target, prediction]))


def _numbered(texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, as numbers that stand for them in all."""
    vocabulary: dict[str, int] = {}
    return [
        [vocabulary.setdefault(token, len(vocabulary)) for token in tokenize(text, None)]
        for text in texts
    ]


def rouge_l(target: Sequence[int], prediction: Sequence[int]) -> float:
    """ROUGE-L F1 of two token lists, in [0, 1]; 0 where either is empty.

    The order of operations is rouge-score's own, so that a score at the border decides alike: four
    common tokens of five come out as 0.8000000000000002, just above the usual limit.
    """
    common = LCSseq.similarity(target, prediction) if target and prediction else 0
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(target)
    return 2 * precision * recall / (precision + recall)
