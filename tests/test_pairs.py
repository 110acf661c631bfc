"""The invariants of the mixed policy, on the pairs that are drawn."""

from collections import Counter
from dataclasses import replace

import pytest

from cluster.sections import Pairs
from pipeline.pairs import PairCounts, Pools, count_pairs, draw_pairs, pool
from pipeline.rows import Pair, Trace

PROMPTS = {f"p{number}": f"question {number}" for number in range(200)}
K = 4


def trace(prompt_id: str, index: int, epoch: int, verdict: str, kept: bool = True) -> Trace:
    return Trace(
        key=f"{prompt_id}-{index}-{epoch}",
        prompt_id=prompt_id,
        sample_index=index,
        model="teacher" if verdict == "right" else f"student-{epoch}",
        epoch=epoch,
        text=f"{verdict} {epoch} {index}",
        finish_reason="length" if index == 1 else "stop",
        tokens=3,
        error=None,
        answer=None,
        verdict=verdict,
        kept=kept,
    )


def traces(epoch: int, verdict: str = "wrong", prompts=PROMPTS) -> dict[str, list[Trace]]:
    return pool(trace(prompt, index, epoch, verdict) for prompt in prompts for index in range(K))


def pools(**given) -> Pools:
    everything = {"positives": traces(0, "right"), "base": traces(0), "later": [traces(3)]}
    return Pools(**{**everything, **given})


def draw(epoch: int, phi: float, given: Pools | None = None, **options) -> list[Pair]:
    return draw_pairs(PROMPTS, given or pools(), epoch, phi, seed=7, **options)


def test_every_kept_positive_is_paired_once():
    positives = {"p1": [trace("p1", 0, 0, "right"), trace("p1", 2, 0, "right")]}
    pairs = draw(2, 0.5, pools(positives=positives))
    assert [(pair.prompt_id, pair.chosen) for pair in pairs] == [
        ("p1", "right 0 0"),
        ("p1", "right 0 2"),
    ]


def test_phi_0_never_uses_a_later_student():
    assert {pair.rejected_epoch for pair in draw(4, 0.0)} == {0}


def test_phi_1_never_uses_the_base_student_after_the_first_epoch():
    assert {pair.rejected_epoch for pair in draw(4, 1.0)} == {3}


def test_phi_is_the_share_of_the_latest_student():
    share = sum(pair.rejected_epoch == 3 for pair in draw(4, 0.3)) / (len(PROMPTS) * K)
    assert share == pytest.approx(0.3, abs=0.05)  # three standard errors of 800 coins


def test_the_first_epoch_is_the_same_for_every_phi():
    first = draw(1, 0.0)
    assert draw(1, 0.5) == first
    assert draw(1, 1.0) == first
    assert {pair.rejected_epoch for pair in first} == {0}


def test_negatives_are_drawn_anew_each_epoch():
    assert draw(2, 0.0) != draw(3, 0.0)


def test_negatives_are_drawn_uniformly():
    counts = Counter(pair.rejected for pair in draw(2, 0.0))
    assert len(counts) == K
    assert min(counts.values()) > 0.8 * len(PROMPTS)


def test_similar_draws_the_negative_that_is_most_like_the_positive():
    texts = ["3 + 5 = 9 pens", "Tom has 3 pens and buys 5, so 9", "no idea at all"]
    base = {"p1": [replace(trace("p1", n, 0, "wrong"), text=text) for n, text in enumerate(texts)]}
    right = replace(trace("p1", 0, 0, "right"), text="Tom has 3 pens and buys 5, so 8")
    for seed in range(5):
        (pair,) = draw_pairs(
            PROMPTS, Pools({"p1": [right]}, base), 1, 0.5, seed=seed, manner="similar"
        )
        assert pair.rejected == texts[1]


def test_recent_draws_from_every_later_student_and_more_from_younger_ones():
    given = pools(later=[traces(3), traces(2), traces(1)])
    counts = Counter(pair.rejected_epoch for pair in draw(4, 1.0, given, manner="recent"))
    total = sum(counts.values())
    shares = [counts[epoch] / total for epoch in (3, 2, 1)]
    assert shares == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.05)
    uniform = Counter(pair.rejected_epoch for pair in draw(4, 1.0, given))
    assert set(uniform) == {3}, "only the latest student, in any other manner"


def test_draws_of_a_prompt_do_not_depend_on_other_prompts():
    alone = {"p5": traces(0, "right")["p5"]}
    expected = [pair for pair in draw(3, 0.5) if pair.prompt_id == "p5"]
    assert draw(3, 0.5, pools(positives=alone)) == expected


def test_an_empty_latest_pool_falls_back_to_the_base_student_flagged():
    pairs = draw(4, 0.5, pools(later=[{}]))
    assert {pair.rejected_epoch for pair in pairs} == {0}
    share = sum(pair.rejected_fallback for pair in pairs) / len(pairs)
    assert share == pytest.approx(0.5, abs=0.06)


def test_phi_1_has_no_fallback():
    pairs = draw(4, 1.0, pools(later=[{}]))
    assert all(pair.rejected is None and not pair.rejected_fallback for pair in pairs)


def test_phi_0_never_reaches_for_a_later_student():
    assert all(pair.rejected is None for pair in draw(4, 0.0, pools(base={})))


def test_a_pair_without_a_negative_has_no_provenance_of_one():
    pair = draw(1, 0.5, pools(base={}))[0]
    assert (pair.rejected_model, pair.rejected_epoch, pair.rejected_finished) == (None, None, None)


def test_provenance_and_cuts_are_carried_over():
    pair = draw(4, 1.0)[1]
    assert (pair.chosen_model, pair.chosen_epoch) == ("teacher", 0)
    assert pair.rejected_model == "student-3"
    assert not pair.chosen_finished
    assert pair.rejected_finished == (not pair.rejected.endswith(" 1"))


def test_prompts_without_a_right_trace_are_left_out():
    some = {f"p{number}": PROMPTS[f"p{number}"] for number in range(50)}
    pairs = draw(2, 0.5, pools(positives=traces(0, "right", some), later=[]))
    assert {pair.prompt_id for pair in pairs} == set(some)
    counts = count_pairs(pairs, Pairs())
    assert counts.pairs == counts.from_base + counts.fallbacks == 50 * K
    assert counts.fallbacks > 0
    assert counts.from_latest == counts.without_negative == 0


def test_single_cot_takes_one_positive_a_prompt():
    pairs = draw(1, 0.5, positives_per_prompt=1)
    assert Counter(pair.prompt_id for pair in pairs) == dict.fromkeys(PROMPTS, 1)


def test_only_kept_traces_are_in_a_pool():
    assert pool([trace("p", 0, 0, "wrong", kept=False)]) == {}


def test_a_fallback_is_counted_apart_from_a_drawn_base_negative():
    pair = draw(4, 0.0)[0]
    latest, fallback = replace(pair, rejected_epoch=3), replace(pair, rejected_fallback=True)
    none = replace(pair, rejected=None, rejected_epoch=None)
    counted = count_pairs([latest, latest, latest, pair, fallback, none], Pairs())
    assert counted == PairCounts(6, 3, 1, 1, 1)
    assert (
        count_pairs([pair], Pairs()).from_base == 1
    )  # in the first epoch the base student is the latest
