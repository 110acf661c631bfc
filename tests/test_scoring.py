"""Scores of given responses: against a slow reference, and never computed twice."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config import parse_config
from cluster.errors import RunError
from cluster.storage import location
from pipeline import scoring
from pipeline.sampling import make_writer
from pipeline.scoring import Answered, plan_scores, score
from pipeline.store import ScoreStore

EXAMPLE = {"question": "How many are two pens?", "answer": "It is \\boxed{2}."}
TEXTS = [
    Answered("Tom has 3 pens. How many?", "He has 3. The answer is \\boxed{3}.", True),
    Answered("Tom has 3 pens. How many?", "He has 3 and", False),
    Answered("Anna had 9 apples.", "", True),
    Answered("Anna had 9 apples.", "So Anna gave 4 away. " * 6, True),
]


@pytest.fixture
def config(tmp_path, tiny_llama, tiny_gemma):
    raw = {
        "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        "task": {"name": "word_problems"},
        "teacher": {"model": str(tiny_gemma), "dtype": "float32", "few_shot": [EXAMPLE]},
        "student": {"model": str(tiny_llama), "dtype": "float32"},
        "scoring": {"engine": "forward", "forward_tokens": 150},
    }
    return parse_config(raw, "test")


@pytest.fixture(params=["teacher", "student"])
def reader(config, request):
    section = getattr(config, request.param)
    return make_writer(request.param, section.model, section, config, "number")


@pytest.fixture
def store(config):
    return ScoreStore(location(config.run.store))


@pytest.fixture
def passes(monkeypatch):
    """Runs the workers in this process, and tells how many responses they were given."""
    given = []

    def run_here(rows, worker, arguments, engines, on_gpu):
        given.append(len(rows))
        table = scoring.pa.Table.from_pylist([vars(row) for row in rows])
        yield worker(*arguments)(table)

    monkeypatch.setattr(scoring, "through_models", run_here)
    return given


def slowly(folder, text, shots):
    """Sum and count of a response's log-probabilities, one text at a time, all logits at once."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    turns = [turn for shot in shots for turn in zip(("user", "assistant"), shot, strict=True)]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages.append({"role": "user", "content": text.message})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    response = tokenizer(text.response, add_special_tokens=False)["input_ids"]
    response += [end] * text.finished
    with torch.no_grad():
        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    ids = enumerate(response, len(prompt) - 1)
    return sum(logps[at, token].item() for at, token in ids), len(response)


def test_scores_are_those_of_the_text_in_the_models_own_template(
    reader, config, store, passes, tiny_llama, tiny_gemma
):
    folder = {"teacher": tiny_gemma, "student": tiny_llama}[reader.name]
    found = score(reader, TEXTS, config, store, on_gpu=False)
    assert set(found) == set(TEXTS)
    for text, scored in found.items():
        logp, tokens = slowly(folder, text, reader.few_shot)
        assert scored.logp == pytest.approx(logp, abs=1e-3)
        assert scored.tokens == tokens


def test_the_teachers_worked_examples_belong_to_its_prompt(config):
    section = config.teacher
    reader = make_writer("teacher", section.model, section, config, "number")
    (request,) = plan_scores(reader, TEXTS[:1]).values()
    assert "two pens" in reader.chat.tokenizer.decode(request.prompt_ids)


def test_nothing_is_scored_twice(reader, config, store, passes):
    first = score(reader, TEXTS[:2], config, store, on_gpu=False)
    both = score(reader, [*TEXTS, *TEXTS], config, store, on_gpu=False)
    again = score(reader, TEXTS, config, store, on_gpu=False)
    assert passes == [2, 2]
    assert again == both
    assert {text: both[text] for text in first} == first


def test_a_response_that_cannot_be_scored_stops_the_run_and_the_others_are_kept(
    reader, config, store, monkeypatch
):
    requests = list(plan_scores(reader, TEXTS).values())

    def refuse_the_last(*_):
        answers = [scoring.ScoreAnswer(-1.0)] * 3 + [scoring.ScoreAnswer(0.0, "too long")]
        yield scoring._keep(requests, answers, reader.weights.digest, store)

    monkeypatch.setattr(scoring, "_fan_out", refuse_the_last)
    with pytest.raises(RunError, match=r"cannot score 1 of 4 .*too long.*max_model_len"):
        score(reader, TEXTS, config, store, on_gpu=False)
    assert store.keys(reader.weights.digest) == {request.key for request in requests[:3]}
