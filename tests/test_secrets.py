"""Keys come from the environment, and end up in no config, log, report, card, row or error."""

import os
import re
import sys
import typing

import pytest
import yaml
from pydantic import BaseModel

import potstill
from cluster import session, storage
from cluster.config import RunConfig, parse_config
from cluster.credentials import holds_credentials
from cluster.errors import BadInputError, RunError
from cluster.recipes import load_recipe
from cluster.run_folder import open_run
from evals.accuracy import Asking, answers_table, ask_all
from evals.report import write_report
from evals.runs import tell_plans
from evals.stage import answers_file
from pipeline.endpoint import ChatEndpoint, ChatRequest, chat_all, check_endpoint
from pipeline.rows import Prompt
from serving.client import ask, printable

PLANTED = {
    name: f"planted-{number}-7f3a"
    for number, name in enumerate(
        (
            "POTSTILL_API_KEY",
            "OPENAI_API_KEY",
            "TEACHER_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "HF_TOKEN",
        )
    )
}
URL = "https://someone:planted-url@example.com"


@pytest.fixture
def keys(monkeypatch):
    for name, key in PLANTED.items():
        monkeypatch.setenv(name, key)


@pytest.fixture
def repeats_keys(chat_server):
    """A server that refuses what it is asked, and says with which key."""
    server = chat_server(lambda _: (400, f"no, {server.keys[-1]}, and no again", {}))
    return server


@pytest.fixture
def recipe(tmp_path, tiny_llama, repeats_keys, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    endpoint = {"url": repeats_keys.url, "api_key_env": "TEACHER_API_KEY"}
    config = {
        "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        "cluster": {"address": "auto"},
        "task": {"name": "word_problems", "train_prompts": 4, "test_prompts": 3},
        "teacher": {"model": "big", "endpoint": endpoint},
        "student": {"model": str(tiny_llama)},
        "sampling": {"max_new_tokens": 32},
        "engines": {"max_model_len": 512},
        "serving": {"max_model_len": 512, "host": "0.0.0.0"},
        "training": {"epochs": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "recipe.yaml"


def written_below(folder):
    """All that is in the files of a folder, tables as their rows."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix == ".parquet":
            yield file, repr(storage.read_table(storage.location(str(file))).to_pylist())
        else:
            yield file, file.read_bytes().decode(errors="replace")


def test_a_run_writes_none_of_the_planted_keys(recipe, keys, repeats_keys, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["potstill", "run", str(recipe), "run.seed=1"])
    (config,) = load_recipe(recipe, ["run.seed=1"])
    tell_plans([config])
    run = open_run(config)
    prompts = [Prompt("p1", "1 + 1?", "number", "2")]
    asking = Asking(repeats_keys.url, "big", 8, key_variable="TEACHER_API_KEY")
    answers = ask_all(asking, prompts, lambda _: None)
    storage.write_table(answers_table(answers), answers_file(run.evaluation("base_test")))
    for line in run.describe(1):
        run.record(note=line)
    write_report(run, config)
    assert repeats_keys.keys == [f"Bearer {PLANTED['TEACHER_API_KEY']}"]
    assert "TEACHER_API_KEY" in answers[0].error, "the server's own words, less the key"
    files = dict(written_below(recipe.parent))
    names = {"config.yaml", "environment.json", "metrics.jsonl", "report.html", "README.md"}
    assert names | {"base_test.parquet"} <= {file.name for file in files}
    shown = "".join(capsys.readouterr())
    assert "requests" in shown, "the plan"
    for key in PLANTED.values():
        assert [str(file) for file, text in files.items() if key in text] == []
        assert key not in shown


def test_ray_is_given_none_of_the_planted_keys(recipe, keys, monkeypatch):
    given = []
    monkeypatch.setattr("ray.init", lambda **options: given.append(repr(options)))
    (joining,) = load_recipe(recipe)
    (own,) = load_recipe(recipe, ["cluster.address=null"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for config in (joining, own):
        session._start(config)
    assert len(given) == 2
    assert [key for key in PLANTED.values() if key in "".join(given)] == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_what_a_server_says_of_a_key_is_not_repeated(status, chat_server, keys):
    server = chat_server(lambda _: (status, f"no, {server.keys[-1]}", {}))
    endpoint = ChatEndpoint(server.url, "big", key_variable="TEACHER_API_KEY", tries_again=0)
    replies = []
    request = ChatRequest([{"role": "user", "content": "Hello"}], 5, {})
    try:
        chat_all(endpoint, [request], lambda _, reply: replies.append(reply.error))
    except BadInputError as error:
        replies.append(str(error))
    assert "no, Bearer $TEACHER_API_KEY" in replies[0]
    assert PLANTED["TEACHER_API_KEY"] not in replies[0]


def test_a_check_of_an_endpoint_does_not_repeat_a_key(chat_server, keys, monkeypatch):
    server = chat_server(models=401)
    key = PLANTED["TEACHER_API_KEY"]
    monkeypatch.setenv("TEACHER_API_KEY", "no list")  # the server's words
    with pytest.raises(BadInputError, match="refuses the key") as refused:
        check_endpoint(ChatEndpoint(server.url, "big", key_variable="TEACHER_API_KEY"))
    assert "no list" not in str(refused.value)
    assert key not in str(refused.value)


OPTIONS = {
    "run.folder": "s3://AKIA1:planted-url@bucket/run",
    "run.store": "s3://bucket/store?X-Amz-Signature=planted-url",
    "task.data": f"{URL}/rows.jsonl",
    "student.model": f"{URL}/model",
    "teacher.model": "gs://bucket/model?token=planted-url",
    "teacher.endpoint.url": f"{URL}/v1",
    "teacher.endpoint.api_key_env": "planted-url",
    "teacher.endpoint.api_key": "planted-url",
    "serving.api_key": "planted-url",
    "cluster.address": "https://user:planted-url@head:8265",
    "base_student": "{model: 's3://a:planted-url@b/c'}",
    "planted": "planted-url",
    "OPENAI_API_KEY": "planted-url",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_takes_a_secret_and_none_is_repeated(option, recipe, monkeypatch, capsys):
    before = sorted(recipe.parent.rglob("*"))
    given = f"{option}={OPTIONS[option]}"
    monkeypatch.setattr(sys, "argv", ["potstill", "run", str(recipe), given])
    with pytest.raises(SystemExit) as stop:
        potstill.main()
    assert stop.value.code == 2
    shown = "".join(capsys.readouterr())
    assert option.partition(".")[0] in shown
    assert "planted-url" not in shown
    assert sorted(recipe.parent.rglob("*")) == before


@pytest.mark.parametrize("command", ["serve", "status", "report"])
def test_the_url_of_a_run_holds_no_secret(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["potstill", command, "s3://me:planted-url@bucket/run"])
    with pytest.raises(SystemExit) as stop:
        potstill.main()
    assert stop.value.code == 2
    shown = "".join(capsys.readouterr())
    assert "come from the environment" in shown
    assert "planted-url" not in shown


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("s3://bucket/run", False),
        ("abfs://container@account.dfs.core.windows.net/run", False),
        ("hf://datasets/org/name@main/rows.parquet", False),
        ("https://example.com/rows.jsonl?download=true", False),
        ("models/mine@v2:latest", False),
        ("See https://me:you@example.com for more.", False),  # a text, not a URL
        ("abfs://container:key@account.dfs.core.windows.net/run", True),
        ("https://token@example.com/rows.jsonl", True),
        ("https://example.com/rows.jsonl?sig=abc", True),
        ("s3://bucket/run?AWSAccessKeyId=abc", True),
        ("S3://a:b@bucket", True),
    ],
)
def test_urls_with_and_without_a_secret(text, holds):
    assert holds_credentials(text) == holds


def options_of(section, seen):
    """Names of all options in a section and in those below it."""
    for name, field in section.model_fields.items():
        yield name
        for kind in sections_in(field.annotation):
            if kind not in seen:
                seen.add(kind)
                yield from options_of(kind, seen)


def sections_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from sections_in(part)


def test_only_the_name_of_a_variable_has_a_place_in_the_configuration():
    names = set(options_of(RunConfig, set()))
    assert {"api_key_env", "few_shot", "time_limit_s"} <= names
    secret = re.compile(r"(^|_)(key|token|secret|password|credentials?)($|_)")
    assert {name for name in names if secret.search(name)} == {"api_key_env"}


def test_a_key_in_the_recipe_of_another_field_is_refused_untold(tmp_path):
    raw = {"run": {"folder": str(tmp_path)}, "teacher": {"model": "a", "api_key": "planted-url"}}
    with pytest.raises(BadInputError, match=r"teacher.api_key is not an option") as refused:
        parse_config(raw, "recipe.yaml")
    assert "planted-url" not in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "named", "sent"),
    [
        ({}, None, "none"),
        ({"OPENAI_API_KEY": "theirs"}, None, "theirs"),
        ({"OPENAI_API_KEY": "theirs", "POTSTILL_API_KEY": "ours"}, None, "ours"),
        ({"OPENAI_API_KEY": "theirs", "POTSTILL_API_KEY": "ours"}, "OPENAI_API_KEY", "theirs"),
    ],
)
def test_a_question_brings_the_key(variables, named, sent, chat_server, monkeypatch):
    for name in ("OPENAI_API_KEY", "POTSTILL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, key in variables.items():
        monkeypatch.setenv(name, key)
    server = chat_server(lambda _: (401, "no", {}))
    with pytest.raises(BadInputError, match=r"refuses the API key: .* variable") as refused:
        ask(server.url, "Hello?", "base", api_key_env=named)
    assert server.keys == [f"Bearer {sent}"]
    assert (named or ("POTSTILL" if "POTSTILL_API_KEY" in variables else "OPENAI")) in str(
        refused.value
    )


def test_a_question_that_fails_does_not_repeat_the_key(chat_server, keys):
    server = chat_server(lambda _: (400, f"no, {server.keys[-1]}", {}))
    with pytest.raises(RunError, match="no, Bearer") as refused:
        ask(server.url, "Hello?", "base")
    assert os.environ["POTSTILL_API_KEY"] not in str(refused.value)


def test_an_answer_does_not_command_the_terminal():
    assert printable("a\x1b]0;title\x07b\x1b[2J\r\x9b31m\tc\n") == "a]0;titleb[2J31m\tc\n"
    assert printable("Straße 日本 🙂\n") == "Straße 日本 🙂\n"
