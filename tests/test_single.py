"""`potstill eval`: what it refuses, and what it measures on an open task."""

import json
import re
from dataclasses import replace

import pytest

from cluster.config import parse_config
from cluster.errors import BadInputError
from evals.single import SingleEvaluation, evaluate_model
from pipeline.endpoint import ChatReply
from serving.client import example_question


@pytest.fixture
def chats(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Say {n}.", "gold": str(n)} for n in range(4)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text("def same(a, prompt):\n    return a == prompt['gold']\n")
    return tmp_path


def wanted(folder, verdict=None, task="chat") -> SingleEvaluation:
    data = str(folder / "chats.jsonl")
    return SingleEvaluation("http://127.0.0.1:9/v1", task, data, verdict=verdict)


def test_the_example_of_an_open_task_is_asked_as_it_stands(chats):
    raw = {
        "run": {"folder": "runs/x"},
        "task": {"name": "chat", "data": str(chats / "chats.jsonl")},
        "teacher": {"model": "big"},
        "student": {"model": "small"},
    }
    command = example_question(parse_config(raw, "test"))
    assert re.search(r"ask 'Say \d\.' --model student --url", command)


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (None, "chat has no verdicts, so nothing can be right or wrong: give one, such as --verd"),
        ("{by: unit_tests}", "needs a column tests"),
        ("{by: function, function: 'no.py:f'}", "no file at"),
        ("{by: [", "is no YAML"),
        ("{by: oracle}", "'oracle' .*'function', 'unit_tests', 'judge'"),
    ],
)
def test_an_open_task_needs_a_verdict(chats, verdict, message):
    with pytest.raises(BadInputError, match=message):
        evaluate_model(wanted(chats, verdict))


def test_the_verdict_is_that_of_the_command(chats, monkeypatch):
    def chat_all(endpoint, requests, on_reply):
        for position, request in enumerate(requests):
            asked = request.messages[-1]["content"]  # Say 0., Say 1., ...
            text = "many" if asked == "Say 3." else asked[4]
            on_reply(position, ChatReply(text, "stop", 5, 1))

    monkeypatch.setattr("evals.accuracy.chat_all", chat_all)
    verdict = f"{{by: function, function: '{chats / 'mine.py'}:same'}}"
    result = evaluate_model(wanted(chats, verdict))
    assert (result["task"], result["n"], result["accuracy"]) == ("chat", 4, 0.75)
    assert result["standard_error"] == pytest.approx(0.2165064)  # sqrt(0.75 * 0.25 / 4)
    assert not (chats / "store").exists()


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://127.0.0.1:9", "http://127.0.0.1:9/v1"),
        ("http://127.0.0.1:9/v1/", "http://127.0.0.1:9/v1"),
        ("https://host/v1beta/openai/", "https://host/v1beta/openai"),
    ],
)
def test_a_url_with_a_path_is_taken_as_it_is(chats, monkeypatch, given, asked):
    def chat_all(endpoint, requests, on_reply):
        assert endpoint.url == asked
        for position in range(len(requests)):
            on_reply(position, ChatReply("0", "stop", 5, 1))

    monkeypatch.setattr("evals.accuracy.chat_all", chat_all)
    verdict = f"{{by: function, function: '{chats / 'mine.py'}:same'}}"
    assert evaluate_model(replace(wanted(chats, verdict), model=given))["n"] == 4


def test_a_context_that_the_model_does_not_have_is_refused(chats, tiny_llama, monkeypatch):
    monkeypatch.setattr("evals.single.refuse_taken_port", lambda host, port: None)
    verdict = f"{{by: function, function: '{chats / 'mine.py'}:same'}}"
    long = replace(wanted(chats, verdict), model=str(tiny_llama), max_new_tokens=5000)
    with pytest.raises(BadInputError, match="5000 leaves no room for a prompt in the 512 tokens"):
        evaluate_model(long)
