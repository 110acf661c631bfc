"""Real Ray Serve and vLLM: one endpoint over a run's models, and the evaluation through it."""

import json
import shutil
import urllib.request

import pytest

from cluster import storage
from cluster.config import parse_config
from cluster.errors import RunError
from cluster.run_folder import RunFolder
from cluster.session import ray_session
from evals.stage import evaluate
from evals.table import results_table
from pipeline.chat import load_chat
from pipeline.tasks import instruct, load_prompts, user_message
from serving.app import start_serving, stop_serving
from serving.client import ask
from serving.models import ServedModel, served_models

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

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
    folder = storage.staging_folder(target)
    shutil.copytree(guesser, folder, dirs_exist_ok=True)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    noisy = {name: tensor + torch.randn_like(tensor) for name, tensor in weights.items()}
    safetensors.torch.save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    storage.publish_folder(folder, target)
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


def test_evaluation_stage(run, config, session):
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


def test_other_origins_are_not_let_in(endpoint):
    request = urllib.request.Request(
        f"{endpoint.url}/models", headers={"Origin": "https://elsewhere.example"}
    )
    with urllib.request.urlopen(request) as response:
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_ask_streams_to_the_screen(endpoint, capsys):
    text = ask(endpoint.url, "Hello", "base", max_tokens=12)
    assert capsys.readouterr().out == f"{text}\n"


def test_another_run_on_the_cluster_has_an_endpoint_of_its_own(endpoint, run, config):
    run_section = config.run.model_copy(update={"folder": f"{config.run.folder}-other"})
    other = config.model_copy(update={"run": run_section})
    base, *_ = served_models(run, config)
    beside = start_serving([base], other)
    try:
        assert beside.url != endpoint.url
        texts = [ask(at.url, "Hello", "base", max_tokens=12) for at in (beside, endpoint)]
        assert texts[0] == texts[1] != ""
    finally:
        stop_serving(other)
    assert ask(endpoint.url, "Hello", "base", max_tokens=12) == texts[0]


def test_model_that_cannot_start_is_named(endpoint, run, config, tmp_path):
    stop_serving(config)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"broken .*" + tmp_path.name):
        start_serving([ServedModel("broken", str(tmp_path))], config)
