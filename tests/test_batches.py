from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import BadInputError
from pipeline.chat import load_chat
from pipeline.rows import Pair
from training.batches import (
    TokenPair,
    count_batch,
    global_batches,
    micro_batches,
    tokenize_pair,
)

PAIR = Pair(
    prompt_id="p1",
    prompt="How many pens?",
    chosen="3 + 5 = 8. \\boxed{8}",
    rejected="It is 7.",
    chosen_model="t",
    chosen_epoch=0,
    rejected_model="s",
    rejected_epoch=0,
    rejected_fallback=False,
    chosen_finished=True,
    rejected_finished=False,
)


@pytest.fixture(scope="module")
def chat(tiny_llama):
    return load_chat(tiny_llama)


def _pairs(lengths):
    return [
        TokenPair(f"p{index}", [1] * 3, [2] * length, [3] * length if index % 2 else None)
        for index, length in enumerate(lengths)
    ]


def test_a_pair_becomes_the_rendered_prompt_and_two_responses(chat):
    tokens = tokenize_pair(PAIR, chat, max_length=200, contrast=True)
    text = chat.tokenizer.decode(tokens.prompt + tokens.chosen)
    assert text == f"<|start|>user\n{PAIR.prompt}<|end|>\n<|start|>assistant\n{PAIR.chosen}<|end|>"
    assert tokens.chosen.count(chat.end_of_turn_id) == 1
    assert chat.tokenizer.decode(tokens.rejected) == PAIR.rejected  # cut: no end of turn
    assert tokens.length == len(tokens.prompt + tokens.chosen + tokens.rejected)


def test_a_response_past_max_length_is_cut_counted_and_loses_its_end_of_turn(chat):
    whole = tokenize_pair(PAIR, chat, 200, contrast=True)
    limit = len(whole.prompt) + len(whole.chosen) - 1
    tokens = tokenize_pair(PAIR, chat, limit, contrast=True)
    assert tokens.chosen == whole.chosen[:-1]
    assert chat.end_of_turn_id not in tokens.chosen
    assert (whole.cut, tokens.cut) == (0, 1)
    assert tokens.rejected == whole.rejected


def test_a_prompt_that_leaves_no_room_is_refused_by_name(chat):
    room = len(chat.prompt_ids(PAIR.prompt))
    tokenize_pair(PAIR, chat, room + 1, contrast=True)
    with pytest.raises(BadInputError, match=rf"p1 has {room} tokens.*max_length={room}"):
        tokenize_pair(PAIR, chat, room, contrast=True)


def test_negatives_are_left_out_where_only_nll_applies(chat):
    assert tokenize_pair(PAIR, chat, 200, contrast=False).rejected is None
    without = replace(PAIR, rejected=None, rejected_finished=None)
    assert tokenize_pair(without, chat, 200, contrast=True).rejected is None


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 5), st.integers(1, 5))
def test_an_epoch_takes_every_pair_once_and_only_the_last_batch_is_smaller(pairs, size, seed, e):
    batches = global_batches(pairs, size, seed, e)
    assert sorted(index for batch in batches for index in batch) == list(range(pairs))
    assert all(len(batch) == size for batch in batches[:-1])
    assert batches == global_batches(pairs, size, seed, e)


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 12))
def test_with_a_number_of_steps_pairs_come_again_as_evenly_as_can_be(pairs, size, steps):
    batches = global_batches(pairs, size, 3, 1, steps)
    assert [len(batch) for batch in batches] == [size] * steps
    times = Counter(index for batch in batches for index in batch)
    most = max(times.values())
    assert all(times[index] in (most, most - 1) for index in range(pairs))


def test_order_changes_with_epoch_and_seed():
    orders = {str(global_batches(50, 8, seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}
    assert len(orders) == 6


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=24),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_workers_share_a_global_batch_without_loss_or_repeat(lengths, micro_batch, workers):
    pairs = _pairs(lengths)
    shares = [micro_batches(pairs, micro_batch, workers, rank) for rank in range(workers)]
    assert len({len(share) for share in shares}) == 1, "a worker would wait for ever"
    taken = [
        pair for share in shares for micro in share if not micro.filler for pair in micro.pairs
    ]
    assert Counter(pair.prompt_id for pair in taken) == Counter(pair.prompt_id for pair in pairs)
    assert all(1 <= len(micro.pairs) <= micro_batch for share in shares for micro in share)


def test_pairs_of_like_length_go_together():
    pairs = _pairs([30, 2, 28, 4, 26, 6])
    micros = micro_batches(pairs, micro_batch=3, workers=2, rank=0)
    micros += micro_batches(pairs, micro_batch=3, workers=2, rank=1)
    chosen = [sorted(len(pair.chosen) for pair in micro.pairs) for micro in micros]
    assert chosen == [[26, 28, 30], [2, 4, 6]]


def test_workers_meet_micro_batches_of_like_length_at_once():
    shares = [micro_batches(_pairs([40, 5, 30, 4]), 1, 2, rank) for rank in range(2)]
    rounds = [{len(m.pairs[0].chosen) for m in together} for together in zip(*shares, strict=True)]
    assert rounds == [{40, 30}, {5, 4}]


def test_a_worker_without_pairs_gets_filler():
    shares = [micro_batches(_pairs([5]), 2, 2, rank) for rank in range(2)]
    assert [[micro.filler for micro in share] for share in shares] == [[False], [True]]


def test_counts_are_of_the_whole_global_batch():
    pairs = _pairs([4, 6, 10])
    counts = count_batch(pairs, score_prompt=False)
    assert (counts.nll_tokens, counts.pairs) == (20, 3)
    # the first token of each prompt of 3 is predicted by nothing
    assert count_batch(pairs, score_prompt=True).nll_tokens == 20 + 3 * 2
