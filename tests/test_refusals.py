"""What `potstill run` refuses: exit code 2 and one line, before anything starts or is written."""

import json
import re
import socket

import pytest

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
def test_a_mistake_is_refused_before_anything_starts(mistake, recipe, refused):
    override, message = MISTAKES[mistake]
    assert re.match(f"error: .*{message}", refused("run", recipe, override))


def test_a_long_problem_of_the_test_part_is_refused(recipe, refused):
    row = {"question": LONG, "answer": "#### 1"}
    (recipe.parent / "data" / "test.jsonl").write_text(json.dumps(row))
    line = refused("run", recipe)
    assert re.match("error: a prompt of .* do not fit in serving.max_model_len=128", line)


def test_a_taken_port_is_refused(recipe, refused):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = refused("run", recipe, f"serving.port={port}")
    assert re.match(f"error: .*port={port} cannot be listened on", line)
