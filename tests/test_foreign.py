"""A teacher that others serve: its samples come from a real server into the store, and cost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import storage
from cluster.config import parse_config
from cluster.errors import BadInputError, RunError
from cluster.run_folder import RunFolder
from evals.foreign import measure_foreign_teacher
from evals.stage import evaluate
from pipeline.foreign import (
    account_of,
    endpoint_keys,
    foreign_writer,
    plan_foreign_requests,
)
from pipeline.sampling import planned_keys, sample
from pipeline.store import SampleStore
from pipeline.tasks import load_prompts, user_message
from pipeline.verdicts.exact import grade_exactly
from serving.models import evaluation_name, served_models

PROJECT = Path(__file__).parents[1]
SHOT = {"question": "1 + 1?", "answer": "\\boxed{2}"}
PRICES = {  # of the server's 20 and 5 tokens a request comes to 25
    "price_per_million_input_tokens": 1e6,
    "price_per_million_output_tokens": 1e6,
}


@pytest.fixture
def config_for(tmp_path, tiny_llama):
    def config(server, endpoint=None, **sections):
        raw = {
            "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
            "cluster": {"accelerator": "cpu"},
            "task": {
                "name": "word_problems",
                "train_prompts": 4,
                "validation_prompts": 2,
                "test_prompts": 3,
            },
            "teacher": {
                "model": "big",
                "few_shot": [SHOT],
                "endpoint": {"url": server.url, **(endpoint or {})},
            },
            "student": {"model": str(tiny_llama)},
            "sampling": {"samples": 3, "max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9},
        }
        for section, options in sections.items():
            raw[section] = raw.get(section, {}) | options
        return parse_config(raw, "test")

    return config


def seeded(body):
    return f"seed {body['seed']}: \\boxed{{1}}"


def writer_of(config):
    return foreign_writer("teacher", config.teacher, config, "number")


def store_of(config):
    return SampleStore(storage.location(config.run.store))


def prompts_of(config, split="train"):
    return load_prompts(config.task, split, config.run.seed)


def draw(config):
    return sample(writer_of(config), prompts_of(config), config, store_of(config), on_gpu=False)


def spent(config):
    return account_of(writer_of(config), config, store_of(config)).open_budget().spent


def test_k_samples_of_a_prompt_are_k_requests_with_seeds_of_their_own(chat_server, config_for):
    server = chat_server(seeded)
    config = config_for(server, teacher={"stop": ["\n\n"]})
    rows = draw(config)
    assert [row.sample_index for row in rows] == [0, 1, 2] * 4
    assert len({row.key for row in rows}) == len({row.text for row in rows}) == 12
    assert {(row.finish_reason, row.tokens, row.model) for row in rows} == {
        ("stop", 5, writer_of(config).digest)
    }
    assert len({body["seed"] for body in server.bodies}) == 12
    asked = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 16, "stop": ["\n\n"], "model": "big"}
    assert all(asked.items() <= body.items() for body in server.bodies)


def test_worked_examples_are_turns_before_the_prompt(chat_server, config_for):
    server = chat_server()
    config = config_for(server, sampling={"samples": 1})
    draw(config)
    asked = {body["messages"][-1]["content"]: body["messages"] for body in server.bodies}
    turns = asked[user_message(prompts_of(config)[0])]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"].startswith("1 + 1?")
    assert turns[1]["content"] == SHOT["answer"]


def test_nothing_is_asked_twice_and_a_larger_k_asks_for_the_rest(chat_server, config_for):
    server = chat_server(seeded)
    first = draw(config_for(server))
    assert draw(config_for(server)) == first
    assert len(server.bodies) == 12
    more = draw(config_for(server, sampling={"samples": 5}))
    assert len(server.bodies) == 20
    assert {row.key for row in first} < {row.key for row in more}


def test_a_key_holds_the_place_the_model_the_manner_and_the_words(chat_server, config_for):
    server = chat_server()
    plain = config_for(server)
    keys = planned_keys(writer_of(plain), prompts_of(plain), plain)
    assert keys == planned_keys(writer_of(config_for(server)), prompts_of(plain), plain)
    same = config_for(server, {"api_key_env": "OTHER", "concurrency": 1, "url": f"{server.url}/"})
    assert planned_keys(writer_of(same), prompts_of(same), same) == keys
    for changed in (
        config_for(server, {"url": "http://elsewhere/v1"}),
        config_for(server, teacher={"model": "bigger"}),
        config_for(server, teacher={"few_shot": []}),
        config_for(server, teacher={"stop": ["x"]}),
        config_for(server, sampling={"temperature": 0.8}),
        config_for(server, sampling={"max_new_tokens": 17}),
        config_for(server, run={"seed": 1}),
    ):
        assert planned_keys(writer_of(changed), prompts_of(plain), changed).isdisjoint(keys)


def test_a_bad_request_is_a_row_with_its_error_and_is_tried_again(chat_server, config_for):
    refused = []

    def reply(body):
        if not refused or body["seed"] in refused:
            refused.append(body["seed"])
            return 400, "too rude", {}
        return "well"

    server = chat_server(reply)
    config = config_for(server, {"concurrency": 1}, sampling={"max_error_share": 0.1})
    rows = draw(config)
    assert "too rude" in rows[0].error
    assert [row.error for row in rows[1:]] == [None] * 11
    assert len(server.bodies) == 12
    refused[:] = [None]  # from now on it is taken
    assert [row.error for row in draw(config)] == [None] * 12
    assert len(server.bodies) == 13


@pytest.mark.fault
def test_too_many_errors_end_it_before_all_is_asked(chat_server, config_for):
    server = chat_server(lambda body: "well" if len(server.bodies) < 3 else (400, "broken", {}))
    config = config_for(server, {"concurrency": 1}, sampling={"max_error_share": 0.1})
    with pytest.raises(RunError, match=r"2 of 12 samples failed.*broken"):
        draw(config)
    assert len(server.bodies) == 4
    assert len(store_of(config).keys(writer_of(config).digest)) == 2


def test_a_refused_key_is_the_users_mistake_and_keeps_what_was_paid(chat_server, config_for):
    server = chat_server(lambda _: "well" if len(server.bodies) < 3 else (401, "expired", {}))
    config = config_for(server, {"concurrency": 1})
    with pytest.raises(BadInputError, match="expired"):
        draw(config)
    assert len(store_of(config).keys(writer_of(config).digest)) == 2


@pytest.mark.fault
def test_the_spending_limit_stops_in_time_and_a_higher_one_goes_on(chat_server, config_for):
    server = chat_server(seeded)
    # A request comes to 25. At most it may come to about 370, since its prompt has 300 bytes.
    config = config_for(server, {**PRICES, "spending_limit": 500})
    with pytest.raises(RunError) as stopped:
        draw(config)
    done = len(server.bodies)
    assert 25 * done == spent(config) <= 500
    assert 3 <= done < 12
    assert f"{25 * done} of 500 is spent" in str(stopped.value)
    assert f"{12 - done} of 12 samples are left" in str(stopped.value)
    assert "raise teacher.endpoint.spending_limit, and the same command" in str(stopped.value)

    with pytest.raises(RunError, match=f"{25 * done} of 500 is spent"):
        draw(config)
    assert len(server.bodies) == done, "a new try has no new money"

    assert len(draw(config_for(server, {**PRICES, "spending_limit": 5000}))) == 12
    assert len(server.bodies) == 12
    assert spent(config) == 300


def test_another_run_pays_only_for_what_it_asks_itself(chat_server, config_for, tmp_path):
    server = chat_server(seeded)
    draw(config_for(server))
    other = {"folder": str(tmp_path / "other"), "store": str(tmp_path / "store")}
    config = config_for(server, {**PRICES, "spending_limit": 1}, run=other)
    assert len(draw(config)) == 12
    assert spent(config) == 0
    assert spent(config_for(server, {**PRICES, "spending_limit": 1})) == 300


SCRIPT = """
import json, sys
from cluster import storage
from cluster.config import parse_config
from pipeline.foreign import foreign_writer
from pipeline.sampling import sample
from pipeline.store import SampleStore
from pipeline.tasks import load_prompts

config = parse_config(json.load(open(sys.argv[1])), "test")
prompts = load_prompts(config.task, "train", config.run.seed)
writer = foreign_writer("teacher", config.teacher, config, "number")
sample(writer, prompts, config, SampleStore(storage.location(config.run.store)), on_gpu=False)
"""


@pytest.mark.fault
def test_a_killed_run_asks_again_for_no_more_than_a_batch(chat_server, config_for, tmp_path):
    def reply(body):
        time.sleep(0.02)
        return seeded(body)

    server = chat_server(reply)
    config = config_for(
        server, {**PRICES, "spending_limit": 1e6}, sampling={"samples": 60}, task={}
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    killed = subprocess.Popen([sys.executable, "-c", SCRIPT, str(file)], cwd=PROJECT)
    deadline = time.monotonic() + 60
    while server.answered < 80:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(10)
    time.sleep(0.3)  # what was under way reaches the server's count

    before = len(server.bodies)
    kept = len(store_of(config).keys(writer_of(config).digest))
    assert spent(config) == 25 * kept
    assert before - kept <= 16 + 2 * config.teacher.endpoint.concurrency
    rows = draw(config)
    assert len(rows) == 240
    assert len(server.bodies) - before == 240 - kept
    assert spent(config) == 25 * 240


def test_the_teacher_is_evaluated_at_its_endpoint_greedily_and_once(chat_server, config_for):
    golds = {}
    server = chat_server(lambda body: f"\\boxed{{{golds[body['messages'][-1]['content']]}}}")
    config = config_for(server, {**PRICES, "spending_limit": 1e6})
    prompts = prompts_of(config, "test")
    golds.update({user_message(prompt): prompt.gold for prompt in prompts})
    result, answers = measure_foreign_teacher("test", prompts, config, grade_exactly)
    assert (result["n"], result["accuracy"]) == (3, 1.0)
    assert (result["model"], result["url"]) == ("big", server.url)
    assert [answer.prompt_id for answer in answers] == [prompt.prompt_id for prompt in prompts]
    assert {(body["temperature"], len(body["messages"])) for body in server.bodies} == {(0.0, 3)}
    assert spent(config) == 75, "it counts for the same limit as the traces"

    measure_foreign_teacher("test", prompts, config, grade_exactly)
    assert len(server.bodies) == 3


def test_the_stage_evaluates_it_without_serving_it(chat_server, config_for):
    server = chat_server()
    config = config_for(server)
    assert [model.model_id for model in served_models(run_of(config), config)] == ["base"]
    run = run_of(config)
    storage.write_json(run.evaluation(evaluation_name("base", "test")), {"accuracy": 0})
    evaluate(run, config_for(server, evaluation={"teacher": False}))
    assert not server.bodies
    evaluate(run, config)  # Ray would take half a minute: only a teacher of one's own needs it
    assert len(server.bodies) == 3
    result = storage.read_json(run.evaluation("teacher_test"))
    assert (result["n"], result["url"]) == (3, server.url)
    evaluate(run, config)
    assert len(server.bodies) == 3


def run_of(config):
    return RunFolder(storage.location(config.run.folder))


def test_the_keys_that_travel_are_those_of_the_teachers(chat_server, config_for, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    config = config_for(chat_server(), {"api_key_env": "OTHER_KEY"})
    assert endpoint_keys(config) == {"OTHER_KEY": "secret"}


def test_the_requests_of_a_plan_are_those_that_are_sent(chat_server, config_for):
    server = chat_server()
    config = config_for(server)
    planned = plan_foreign_requests(writer_of(config), prompts_of(config), 3, config.run.seed)
    draw(config)
    assert {request.seed for request in planned} == {body["seed"] for body in server.bodies}
