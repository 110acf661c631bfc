"""What reference and teacher are asked, and how the answers come back to the pairs."""

import pytest

from cluster import storage
from cluster.config import parse_config
from cluster.publishing import publish_folder, staging_folder
from cluster.run_folder import RunFolder
from pipeline.anchors import asked_of, fit, fit_pairs, unrelated_answers
from pipeline.chat import load_chat
from pipeline.rows import Anchor, Pair, to_table
from pipeline.scoring import Answered
from training.examples import Examples


def pair(prompt: int, index: int, rejected: bool = True) -> Pair:
    return Pair(
        prompt_id=f"p{prompt}",
        prompt=f"Tom has {prompt} pens.",
        chosen=f"right {prompt} {index}",
        rejected=f"wrong {prompt} {index}" if rejected else None,
        chosen_model="teacher",
        chosen_epoch=0,
        rejected_model="student" if rejected else None,
        rejected_epoch=0 if rejected else None,
        rejected_fallback=False,
        chosen_finished=True,
        rejected_finished=True if rejected else None,
    )


PAIRS = [pair(0, 0), pair(0, 1), pair(0, 2), pair(1, 0, rejected=False), pair(2, 0)]
PAIRS += [pair(3, 0), pair(3, 1)]


@pytest.fixture
def chat(tiny_llama):
    return load_chat(tiny_llama)


@pytest.fixture
def config(tiny_llama, tmp_path, request):
    raw = {
        "run": {"folder": str(tmp_path)},
        "task": {"name": "word_problems"},
        "teacher": {"model": str(tiny_llama)},
        "student": {"model": str(tiny_llama)},
        "training": request.param,
    }
    return parse_config(raw, "test")


def test_an_unrelated_answer_is_another_prompts(chat):
    for ours, other in zip(PAIRS, unrelated_answers(PAIRS, chat, 512), strict=True):
        assert other.message == ours.prompt
        assert other.response.startswith("right")
        assert ours.prompt.split()[2] != other.response.split()[1]


def test_a_text_is_cut_as_text_and_then_has_no_end_of_turn(chat):
    long = Answered("Tom has 3 pens.", "He buys 5 more pens. " * 20, True)
    prompt = len(chat.prompt_ids(long.message))
    short = fit(long, chat, prompt + 30)
    assert long.response.startswith(short.response)
    assert not short.finished
    assert 20 < len(chat.response_ids(short.response, short.finished)) <= 30
    assert fit(long, chat, 4096) == long


def test_a_cut_within_a_character_still_fits_when_it_is_read_again(chat):
    snow = Answered("Tom has 3 pens.", "☃" * 40, True)
    prompt = len(chat.prompt_ids(snow.message))
    for limit in range(prompt, prompt + 12):
        short = fit(snow, chat, limit)
        assert len(chat.response_ids(short.response, short.finished)) <= limit - prompt


def test_pairs_are_cut_on_both_sides(chat):
    limit = len(chat.prompt_ids(PAIRS[0].prompt)) + 4
    (cut,) = fit_pairs(PAIRS[:1], chat, limit)
    assert (cut.chosen_finished, cut.rejected_finished) == (False, False)
    assert PAIRS[0].chosen.startswith(cut.chosen)
    assert fit_pairs(PAIRS, chat, 4096) == PAIRS


ASKED = [
    ({"method": "dadpo"}, {"reference": 13, "teacher": 13}),
    ({"method": "dadpo", "teacher_weight": 0}, {"reference": 13}),
    ({"method": "dadpo", "reference_weight": 0}, {"teacher": 13}),
    ({"method": "kto"}, {"reference": 20}),
    ({"method": "orpo"}, {}),
    ({"method": "sft", "kl_weight": 0.1}, {}),
]


@pytest.mark.parametrize(("config", "texts"), ASKED, indirect=["config"])
def test_only_who_counts_is_asked(config, texts, chat):
    asked = {name: len(asked_of(name, PAIRS, config, chat)) for name in config.scored_by}
    assert asked == texts


@pytest.mark.parametrize("config", [{"method": "dadpo"}, {"method": "kto"}], indirect=True)
def test_scores_come_back_by_text_and_not_by_position(config, chat):
    run = RunFolder(storage.location(config.run.folder))
    staging = staging_folder(run.pairs(1))
    storage.write_table(to_table(Pair, PAIRS), storage.location(str(staging / "pairs.parquet")))
    publish_folder(staging, run.pairs(1))
    said: dict[tuple[str, str, str], float] = {}
    anchors = []
    for reader in config.scored_by:
        for text in reversed(asked_of(reader, PAIRS, config, chat)):
            said[reader, text.message, text.response] = -float(len(said) + 1)
            anchors.append(Anchor(reader, text.key, "model", -float(len(said)), 3))
    storage.write_table(to_table(Anchor, anchors), run.scores(1))
    examples = Examples(run, 1, config, chat)
    assert len(examples) == len(PAIRS)
    for index, ours in enumerate(PAIRS):
        found = examples[index].anchors
        for reader in config.scored_by:
            chosen = said[reader, ours.prompt, ours.chosen]
            assert getattr(found, f"{reader}_chosen") == chosen
            if ours.rejected:
                rejected = said[reader, ours.prompt, ours.rejected]
                assert getattr(found, f"{reader}_rejected") == rejected
    if config.training.method == "kto":
        other = unrelated_answers(PAIRS, chat, config.training.max_length)[0]
        assert (
            examples[0].anchors.reference_unrelated
            == (said["reference", other.message, other.response])
        )
