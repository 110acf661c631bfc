"""What sampling asks of the store, and what it gives back: without an engine."""

from dataclasses import replace

import pytest

from cluster.config import parse_config
from cluster.errors import RunError
from cluster.storage import location
from pipeline.rows import Sample
from pipeline.sampling import make_writer, plan_requests, sample
from pipeline.store import SampleStore
from pipeline.tasks import load_prompts


@pytest.fixture
def config(tmp_path, tiny_llama):
    raw = {
        "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        "task": {"name": "word_problems", "train_prompts": 4},
        "teacher": {"model": str(tiny_llama)},
        "student": {"model": str(tiny_llama)},
        "sampling": {"samples": 2, "max_new_tokens": 16},
    }
    return parse_config(raw, "test")


@pytest.fixture
def prompts(config):
    return load_prompts(config.task, "train", 0)


@pytest.fixture
def writer(config, prompts):
    return make_writer("student", config.student.model, config.student, config, prompts[0].kind)


@pytest.fixture
def full_store(config, writer, prompts):
    store = SampleStore(location(config.run.store))
    requests = plan_requests(writer, prompts, config.sampling.samples, config.run.seed)
    rows = [(request.key, request.prompt_id, request.sample_index) for request in requests]
    store.write(Sample(*row, writer.weights.digest, f"text of {row[0]}", "stop", 3) for row in rows)
    return store


def keys_of(writer, prompts, samples=2, seed=0):
    return {request.key for request in plan_requests(writer, prompts, samples, seed)}


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("decoding.temperature", lambda temperature: temperature / 2),
        ("decoding.top_p", lambda share: share / 2),
        ("decoding.max_new_tokens", lambda tokens: tokens + 1),
        ("decoding.stop", lambda stop: (*stop, "Question:")),
        ("decoding.end_of_turn_id", lambda token: token + 1),
        ("weights.dtype", lambda _: "float32"),
        ("weights.digest", lambda _: "of another model"),
        ("chat.template", lambda template: template + "{# which writes the same #}"),
        ("few_shot", lambda _: (("How many are two pens?", "\\boxed{2}"),)),
    ],
)
def test_what_shapes_a_sample_is_in_its_key(writer, prompts, path, change):
    part, _, name = path.rpartition(".")
    whole = getattr(writer, part) if part else writer
    other = replace(whole, **{name: change(getattr(whole, name))})
    other = replace(writer, **{part: other}) if part else other
    assert keys_of(other, prompts).isdisjoint(keys_of(writer, prompts))


def test_prompt_and_seed_are_in_a_key_and_the_number_of_samples_is_not(writer, prompts):
    keys = keys_of(writer, prompts)
    assert len(keys) == 4 * 2
    assert keys < keys_of(writer, prompts, samples=3)
    assert keys.isdisjoint(keys_of(writer, prompts, seed=1))
    asked_otherwise = [replace(prompt, question=f"{prompt.question} ") for prompt in prompts]
    assert keys.isdisjoint(keys_of(writer, asked_otherwise))


def test_a_full_store_answers_in_order_of_prompt_and_sample(config, writer, prompts, full_store):
    found = sample(writer, prompts, config, full_store, on_gpu=False)
    expected = [(prompt.prompt_id, index) for prompt in prompts for index in range(2)]
    assert [(row.prompt_id, row.sample_index) for row in found] == expected


def test_samples_follow_their_text_to_a_prompt_of_another_id(config, writer, prompts, full_store):
    before = sample(writer, prompts, config, full_store, on_gpu=False)
    renamed = [replace(prompt, prompt_id=f"row {n}") for n, prompt in enumerate(prompts)]
    twice = [*renamed, replace(renamed[0], prompt_id="again")]
    after = sample(writer, twice, config, full_store, on_gpu=False)
    assert [row.text for row in after] == [row.text for row in (*before, *before[:2])]
    assert [row.prompt_id for row in after[-3:]] == ["row 3", "again", "again"]


def test_samples_that_vanish_from_the_store_are_an_error(
    config, writer, prompts, full_store, monkeypatch
):
    monkeypatch.setattr(SampleStore, "read", lambda *_: {})
    with pytest.raises(RunError, match="8 of 8 samples of student are not in"):
        sample(writer, prompts, config, full_store, on_gpu=False)
