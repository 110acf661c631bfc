import random

from hypothesis import example, given, settings, strategies
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from pipeline.diversity import keep_diverse, rouge_l

SCORER = RougeScorer(["rougeL"])

WORDS = ["the", "The", "cat", "sat", "3", "+", "5", "=", "мир", "é", "\u2028", ".", "ab-cd", "x_y"]
TEXTS = strategies.lists(strategies.sampled_from(WORDS), max_size=14).map(" ".join)


def peer_score(target: str, prediction: str) -> float:
    return SCORER.score(target, prediction)["rougeL"].fmeasure


def plainly_kept(texts: list[str], largest: float) -> list[int]:
    kept: list[int] = []
    for index, text in enumerate(texts):
        scores = [1.0 if texts[other] == text else peer_score(texts[other], text) for other in kept]
        if all(score <= largest for score in scores):
            kept.append(index)
    return kept


@settings(deadline=None)
@given(TEXTS | strategies.text(), TEXTS | strategies.text())
@example("", "")
@example("a b c d e", "a b c d x")  # on the border, 0.8
@example("İstanbul ſ K", "i stanbul s k")
def test_the_score_is_that_of_rouge_score(target, prediction):
    ids: dict[str, int] = {}
    first, second = (
        [ids.setdefault(token, len(ids)) for token in tokenize(text, None)]
        for text in (target, prediction)
    )
    assert rouge_l(first, second) == peer_score(target, prediction)


@settings(max_examples=300, deadline=None)
@given(
    strategies.lists(TEXTS | strategies.text(max_size=5), max_size=8),
    strategies.sampled_from([0.0, 0.5, 2 / 3, 0.8, 0.9, 1.0]),
)
@example(["a b c d e", "a b c d x"], 0.8)
def test_the_decisions_are_those_of_rouge_score(texts, largest):
    assert keep_diverse(texts, largest) == plainly_kept(texts, largest)


def test_a_trace_is_kept_at_the_limit_and_dropped_above_it():
    texts = ["a b c d", "a b c x", "a b c d e"]  # 3 / 4, then 8 / 9, to the first
    assert keep_diverse(texts, 0.75) == [0, 1]
    assert keep_diverse(texts, 0.74) == [0]
    assert keep_diverse(texts, 0.9) == [0, 1, 2]
    assert keep_diverse(texts) == [0, 1]


def test_rouge_score_rounds_four_fifths_up():
    texts = ["a b c d e", "a b c d x"]
    assert peer_score(*texts) > 0.8
    assert keep_diverse(texts) == [0]


def test_only_kept_traces_count():
    # The third is near the second (0.8), which was dropped, and far from the first (0.6).
    texts = ["a b c d e", "a b c d x", "a b c x y"]
    assert keep_diverse(texts, 0.7) == [0, 2]


def test_texts_the_same_to_the_letter_are_duplicates_in_every_script():
    assert peer_score("мир", "мир") == 0
    assert keep_diverse(["мир", "мир", "вода", "", ""]) == [0, 2, 3]


def test_no_texts():
    assert keep_diverse([]) == []


def test_long_unlike_traces_are_all_kept():
    generator = random.Random(0)
    vocabulary = [f"w{number}" for number in range(300)]
    texts = [" ".join(generator.choices(vocabulary, k=500)) for _ in range(32)]
    assert keep_diverse(texts) == list(range(32))
