"""What `potstill run` refuses: exit code 2 and one line, before anything starts or is written."""

import json
import re
import socket
import sys

import pytest
import yaml

import potstill


@pytest.fixture
def recipe(tiny_llama, tmp_path, monkeypatch):
    """A configuration that could run, on problems of one's own."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for split, first in (("train", 0), ("validation", 10), ("test", 20)):
        rows = [
            {"question": f"Tom has {n} pens and buys 5 more. How many?", "answer": f"#### {n + 5}"}
            for n in range(first, first + 5)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = {
        "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        "task": {"name": "gsm8k", "data": str(tmp_path / "data")},
        "teacher": {"model": str(tiny_llama)},
        "student": {"model": str(tiny_llama)},
        "sampling": {"max_new_tokens": 40},
        "training": {"max_length": 128},
        "engines": {"max_model_len": 128},
        "serving": {"max_model_len": 128, "port": port},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "recipe.yaml"


def files_of(recipe):
    return {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*")}


def refused(recipe, monkeypatch, capsys, *overrides):
    """The line that the user sees."""
    monkeypatch.setattr(sys, "argv", ["potstill", "run", str(recipe), *overrides])
    before = files_of(recipe)
    with pytest.raises(SystemExit) as stop:
        potstill.main()
    assert stop.value.code == 2
    assert files_of(recipe) == before
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), "expected one line"
    return err


LONG = "How many are there now, " * 40
MISTAKES = {
    "labels of nodes that have none": (
        "cluster.sampling_nodes=stage=a",
        "has no labels: set it to",
    ),
    "a missing model": ("student.model=/no/such/model", "no model '/no/such/model'"),
    "an unknown option": ("training.epoch=3", "training.epoch is not an option: .*epochs"),
    "missing data": ("task.data=/no/such/data.jsonl", "nothing is at /no/such/data.jsonl"),
    "too many prompts": ("task.test_prompts=6", "6 prompts asked of .*which has 5"),
    "a small engine": ("engines.max_model_len=70", "tokens .*engines.max_model_len=70: raise"),
    "too few CPUs": (
        "cluster.logical_cpus=1",
        "hold 2 logical CPUs, .*cluster.logical_cpus=1 offers too few: raise it",
    ),
    "a small endpoint": ("serving.max_model_len=70", "tokens .*serving.max_model_len=70: raise"),
    "long worked examples": (
        f"teacher.few_shot={json.dumps([{'question': LONG, 'answer': '3'}])}",
        "tokens .*engines.max_model_len=128: raise",
    ),
    "short rows": ("training.max_length=20", "no room for a response in training.max_length=20"),
    "a large engine": ("engines.max_model_len=4096", "more than the teacher's own context of 512"),
    "a large endpoint": ("serving.max_model_len=4096", "more than the teacher's own context"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_starts(mistake, recipe, monkeypatch, capsys):
    override, message = MISTAKES[mistake]
    assert re.match(f"error: .*{message}", refused(recipe, monkeypatch, capsys, override))


def test_problems_without_gold_answers_are_refused(recipe, monkeypatch, capsys):
    (recipe.parent / "data" / "train.jsonl").write_text('{"question": "Why?", "answer": "So."}')
    line = refused(recipe, monkeypatch, capsys)
    assert re.match("error: .*train.jsonl line 1: the gold answer is 'So.'", line)


def test_a_long_problem_of_the_test_part_is_refused(recipe, monkeypatch, capsys):
    row = {"question": LONG, "answer": "#### 1"}
    (recipe.parent / "data" / "test.jsonl").write_text(json.dumps(row))
    line = refused(recipe, monkeypatch, capsys)
    assert re.match("error: a prompt of .* do not fit in serving.max_model_len=128", line)


def test_a_taken_port_is_refused(recipe, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = refused(recipe, monkeypatch, capsys, f"serving.port={port}")
    assert re.match(f"error: .*port={port} cannot be listened on", line)
