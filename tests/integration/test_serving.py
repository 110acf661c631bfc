"""Real Ray Serve and vLLM: one endpoint over a run's models, and the evaluation through it."""

import json
import re
import shutil
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest

from cluster import storage
from cluster.config import parse_config
from cluster.errors import BadInputError, RunError
from cluster.publishing import publish_folder, staging_folder
from cluster.run_folder import RunFolder
from cluster.session import ray_session
from evals.stage import evaluate
from evals.table import results_table
from pipeline.chat import load_chat
from pipeline.endpoint import ChatEndpoint
from pipeline.tasks import instruct, load_prompts, user_message
from serving.app import start_serving, stop_serving
from serving.client import ask
from serving.models import ServedModel, served_models

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

KEY = "planted-0f3c9a71"
SHOT = {"question": "Tom has 3 pens and buys 5 more. How many?", "answer": "It is \\boxed{8}."}


@pytest.fixture(scope="module")
def config(guesser, free_port, tmp_path_factory):
    root = tmp_path_factory.mktemp("serving")
    raw = {
        "run": {"folder": str(root / "run"), "store": str(root / "store")},
        "task": {"name": "word_problems", "test_prompts": 6},
        "teacher": {"model": str(guesser), "few_shot": [SHOT]},
        "student": {"model": str(guesser)},
        "training": {"epochs": 1},
        "serving": {
            "port": free_port(),
            "max_model_len": 512,
            "kv_cache_gib": 0.1,
            "start_timeout_s": 200,
        },
        "evaluation": {"max_new_tokens": 48},
    }
    return parse_config(raw, "test")


@pytest.fixture(scope="module")
def run(config, guesser):
    """A run whose student is trained: its weights are others than the base's."""
    import safetensors.torch
    import torch

    run = RunFolder(storage.location(config.run.folder))
    target = run.checkpoint(1)
    folder = staging_folder(target)
    shutil.copytree(guesser, folder, dirs_exist_ok=True)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    noisy = {name: tensor + torch.randn_like(tensor) for name, tensor in weights.items()}
    safetensors.torch.save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    publish_folder(folder, target)
    return run


@pytest.fixture(scope="module")
def session(config):
    with ray_session(config):
        yield


@pytest.fixture(scope="module")
def endpoint(run, config, session):
    """Base and teacher on one engine; the student of the run stays on demand."""
    base, teacher, *_ = served_models(run, config)
    student = ServedModel("student", str(run.checkpoint(1)), resident=False)
    yield start_serving([base, teacher, student], config)
    stop_serving(config)


@pytest.fixture(scope="module")
def client(endpoint):
    import openai

    with openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0) as client:
        yield client


def complete(client, model, text="Hello", **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=12, temperature=0, **options
    )


def test_evaluation_stage(run, config, session, monkeypatch):
    monkeypatch.setenv("POTSTILL_API_KEY", KEY)  # which the endpoint now asks its callers for
    evaluate(run, config)
    names = ["base_test", "student-epoch-1_test", "teacher_test"]
    results = {name: json.loads(run.evaluation(name).read_text()) for name in names}
    assert {result["n"] for result in results.values()} == {6}
    assert all(result["errors"] == 0 for result in results.values())
    # The base has learned to end its answers; noise has made the checkpoint forget it.
    assert results["student-epoch-1_test"]["cut"] > results["base_test"]["cut"]
    answers = {
        name: storage.read_table(run.evaluation(name).with_suffix(".parquet")).to_pylist()
        for name in names
    }
    texts = {name: [row["text"] for row in rows] for name, rows in answers.items()}
    assert texts["teacher_test"] != texts["base_test"]  # one engine, but a worked example more
    for name in names:
        right = sum(row["verdict"] == "right" for row in answers[name])
        assert results[name]["accuracy"] == right / 6
    assert results_table(run, config).row_count == 3


def test_evaluation_keeps_what_is_there(run, config, session, monkeypatch):
    monkeypatch.setattr("evals.stage.start_serving", None)  # would fail where it is called
    evaluate(run, config)


def test_all_ids_are_listed(client):
    assert [model.id for model in client.models.list()] == ["base", "teacher", "student"]


def test_answer_and_stream_agree(client):
    whole = complete(client, "base")
    assert whole.model == "base"
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in complete(client, "base", stream=True)
        if chunk.choices
    ]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content


def test_prompt_is_rendered_as_in_training(client, config, guesser):
    chat = load_chat(guesser)
    message = user_message(load_prompts(config.task, "test", 0)[0])
    usage = complete(client, "base", message).usage
    assert usage.prompt_tokens == len(chat.prompt_ids(message))


def test_teacher_is_shown_its_worked_example(client, guesser):
    chat = load_chat(guesser)
    shots = [(instruct(SHOT["question"], "number"), SHOT["answer"])]
    answer = complete(client, "teacher")
    assert answer.model == "teacher"
    assert answer.usage.prompt_tokens == len(chat.prompt_ids("Hello", shots))
    assert answer.usage.prompt_tokens > complete(client, "base").usage.prompt_tokens
    stream = complete(client, "teacher", stream=True)
    assert {chunk.model for chunk in stream} == {"teacher"}


def test_unknown_model_is_not_found(client):
    import openai

    with pytest.raises(openai.NotFoundError) as refused:
        complete(client, "student-epoch-9")
    assert "student-epoch-9" in refused.value.body["message"]


def test_a_body_without_its_type_is_the_callers_mistake(endpoint):
    import httpx

    answer = httpx.post(f"{endpoint.url}/chat/completions", content=b'{"model": "base"}')
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_too_long_a_prompt_is_a_bad_request(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        complete(client, "base", "pens " * 600)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model="base", prompt="pens " * 600, max_tokens=12)


def test_many_answers_to_one_request_are_refused(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="129 answers"):
        complete(client, "base", n=129)
    with pytest.raises(openai.BadRequestError, match="200 answers"):
        client.completions.create(model="base", prompt=["a", "b"], n=100, max_tokens=1)


def test_other_origins_are_not_let_in(endpoint):
    import httpx

    asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{endpoint.url}/chat/completions", headers=asked)
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.lower().startswith("access-control")]
    request = urllib.request.Request(
        f"{endpoint.url}/models", headers={"Origin": "https://elsewhere.example"}
    )
    with urllib.request.urlopen(request) as response:
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_ask_streams_to_the_screen(endpoint, capsys):
    text = ask(endpoint.url, "Hello", "base", max_tokens=12)
    assert capsys.readouterr().out == f"{text}\n"


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def check_key(url):
    """No way in without the key, whatever is asked."""
    import httpx

    for method, path in (("GET", "models"), ("POST", "chat/completions"), ("GET", "no/such")):
        for headers in ({}, bearer("wrong"), bearer(f"{KEY}x")):
            answer = httpx.request(method, f"{url}/{path}", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
            assert "Bearer" in answer.headers["WWW-Authenticate"]
    assert httpx.get(f"{url}/models", headers=bearer(KEY)).status_code == 200


def check_limits(url):
    """Of a body and of requests at once: an endpoint of 20 KiB and one request."""
    import httpx

    chat, headers = f"{url}/chat/completions", bearer(KEY)
    large = {"model": "base", "messages": [{"role": "user", "content": "pens " * 6000}]}
    assert httpx.post(chat, json=large, headers=headers).status_code == 413
    pieces = (b"0" * 1024 for _ in range(30))
    assert httpx.post(chat, content=pieces, headers=headers).status_code == 413
    small = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    long = small | {"max_tokens": 400, "min_tokens": 400, "stream": True}
    with httpx.stream("POST", chat, json=long, headers=headers, timeout=100) as held:
        assert held.status_code == 200
        lines = held.iter_lines()
        next(lines)
        refused = httpx.post(chat, json=small, headers=headers)
        listed = httpx.get(f"{url}/models", headers=headers)
        assert sum(1 for line in lines if line) > 50, "the stream that was under way goes on"
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["Retry-After"]) > 0
    assert listed.status_code == 200


def test_another_run_has_an_endpoint_of_its_own_with_a_key(endpoint, run, config, monkeypatch):
    run_section = config.run.model_copy(update={"folder": f"{config.run.folder}-other"})
    narrow = config.serving.model_copy(update={"max_body_mib": 20 / 1024, "max_concurrency": 1})
    other = config.model_copy(update={"run": run_section, "serving": narrow})
    base, *_ = served_models(run, config)
    monkeypatch.setenv("POTSTILL_API_KEY", KEY)
    beside = start_serving([base], other)
    try:
        assert beside.url != endpoint.url
        texts = [ask(at.url, "Hello", "base", max_tokens=12) for at in (beside, endpoint)]
        assert texts[0] == texts[1] != ""
        check_key(beside.url)
        check_limits(beside.url)
        assert ask(beside.url, "Hello", "base", max_tokens=12) == texts[0]  # its place is free
        monkeypatch.setenv("POTSTILL_API_KEY", "wrong")
        with pytest.raises(BadInputError, match="refuses the API key"):
            ask(beside.url, "Hello", "base")
    finally:
        stop_serving(other)
    assert ask(endpoint.url, "Hello", "base", max_tokens=12) == texts[0]


LOAD = 24


@dataclass
class Asked:
    """One request under load: when it was sent, when it ended, and its answer if it got one."""

    sent: float
    ended: float
    text: str | None


def under_load(url, model, tries_again, until) -> list[Asked]:
    """What LOAD callers ask, one request after the other each; the last is sent after a time."""
    import openai

    def call(number: int) -> list[Asked]:
        found = []
        with openai.OpenAI(base_url=url, api_key="none", max_retries=tries_again) as client:
            while not found or found[-1].sent < until():
                sent = time.monotonic()
                try:
                    text = complete(client, model, "Hello").choices[0].message.content
                except openai.APIError:
                    text = None
                found.append(Asked(sent, time.monotonic(), text))
        return found

    with ThreadPoolExecutor(LOAD) as callers:
        return [asked for found in callers.map(call, range(LOAD)) for asked in found]


def kill_replica(name: str) -> float:
    """Kill the processes of a replica; the time at which it was done."""
    victims = [
        process
        for process in psutil.Process().children(recursive=True)
        if re.search(name, " ".join(process.cmdline()))
    ]
    assert victims
    for process in victims:
        process.kill()
    return time.monotonic()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("replica", "tries_again"),
    [
        ("LLMServer", ChatEndpoint.tries_again),
        pytest.param("LLMServer", 0, marks=pytest.mark.long),
        pytest.param("Ingress", ChatEndpoint.tries_again, marks=pytest.mark.long),
        pytest.param("Ingress", 0, marks=pytest.mark.long),
    ],
)
def test_a_replica_that_dies_under_load_takes_no_more_than_what_it_had(
    endpoint, client, replica, tries_again, measured
):
    truth = complete(client, "base").choices[0].message.content
    killed = [float("inf")]

    def kill() -> None:
        time.sleep(3)
        killed[0] = kill_replica(f"ServeReplica:.*{replica}")

    thread = threading.Thread(target=kill)
    thread.start()
    asked = under_load(endpoint.url, "base", tries_again, lambda: killed[0] + 8)
    thread.join()
    lost = [one for one in asked if one.text is None]
    back = min(one.ended for one in asked if one.text and one.sent > killed[0]) - killed[0]
    measured(
        f"{replica} killed: {len(asked)} requests, {len(lost)} lost, {tries_again} tries again, "
        f"the first new one answered after {back:.0f} s"
    )
    assert {one.text for one in asked} - {None} == {truth}
    assert [one for one in lost if not one.sent <= killed[0] <= one.ended] == []
    if tries_again:
        assert lost == []


def test_model_that_cannot_start_is_named(endpoint, run, config, tmp_path):
    stop_serving(config)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"broken .*" + tmp_path.name):
        start_serving([ServedModel("broken", str(tmp_path))], config)
