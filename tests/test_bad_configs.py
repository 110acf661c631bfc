"""Configurations and commands that cannot work: what is refused, where a run exists already too."""

import re
import socket

import pytest
from s3fs import S3FileSystem

from cluster.recipes import load_config
from cluster.run_folder import open_run

PRICES = "price_per_million_input_tokens: 1, price_per_million_output_tokens: 1"

# The option that is changed, and the words of the error beside its name.
OPTIONS = {
    # numbers
    "training.learning_rate=-1": "greater than 0",
    "training.learning_rate=.inf": "a finite number",
    "training.odds_ratio_weight=-0.1": "greater than or equal to 0",
    "training.odds_ratio_weight=.nan": "greater than or equal to 0|a finite number",
    "training.betas=[1, 1]": "less than 1",
    "training.epochs=1e400": "a valid integer",
    "training.epochs=100000000000000000000000": "less than or equal to 999",
    "training.method=ppo": "'orpo', 'sft', 'dadpo' or 'kto'",
    "pairs.phi=1.5": "less than or equal to 1",
    "pairs.phi=-0.5": "greater than or equal to 0",
    "sampling.temperature=.inf": "a finite number",
    "sampling.samples=10000000000000": "less than or equal to 10000",
    "sampling.top_p=0": "greater than 0",
    "run.seed=-1": "greater than or equal to 0",
    "run.seed=1.5": "a valid integer",
    "task.max_error_share=2": "less than or equal to 1",
    "teacher.dtype=int8": "'bfloat16', 'float16' or 'float32'",
    # names and texts
    "training.epoch=3": "is not an option: options here are method",
    "student.stop=['']": "at least 1 character",
    "student.chat_template=no.jinja": "neither a Jinja text nor a file",
    "engines.cpu_threads=all": "should match pattern",
    "engines.cpu_threads='0|1'": "does not name cores for each of engines.tensor_parallel=1",
    "task.name=gsm9": "is no task, expected one of arc_challenge",
    # sizes
    "training.micro_batch=64": "not a multiple of micro_batch x workers = 64: change one",
    "training.global_batch=33": "not a multiple of micro_batch x workers = 4: change one",
    "training.workers=3": "not a multiple of micro_batch x workers = 12: change one",
    "training.min_workers=3": "is more than workers=1: lower it, or raise workers",
    "training.keep=none": "'each_epoch', 'best_and_last' or 'last'",
    "training.max_length=20": "no room for a response in .*: raise it",
    "engines.max_model_len=60": "do not fit in .*: raise it or lower the new tokens",
    "engines.kv_cache_gib=100000": "No room for 1 engine .* on this machine .* fits with .*gib=",
    "engines.kv_cache_gib=0.00001": "holds no sequence of .*len=128 .*: raise it to 6.1e-05",
    "serving.kv_cache_gib=0.00001": "holds no sequence of .*len=128 .*: raise it to 6.1e-05",
    "sampling.max_new_tokens=128": "leaves no room for a prompt .*: raise the context or lower",
    "cluster.logical_cpus=1": "offers too few: raise it",
    "serving.port=70000": "less than or equal to 65535",
    # places
    "run.folder=''": "no name, path or URL: give one",
    "run.folder=recipe.yaml": "recipe.yaml is a file: give another",
    "run.folder=recipe.yaml/run": "recipe.yaml is a file: give another",
    "run.store=recipe.yaml": "recipe.yaml is a file: give another",
    # endpoints
    "teacher.endpoint={url: api.example.com/v1}": "url must be a base URL such as https://",
    "teacher.endpoint={url: 'http://127.0.0.1:99999'}": "url must be a base URL such as https://",
    "teacher.endpoint={url: 'http://[::1/v1'}": "url must be a base URL such as https://",
    "teacher.endpoint={url: 'https://me:key@x/v1'}": "without user, password .*the environment",
    "teacher.endpoint={url: 'http://x/v1', api_key_env: sk-1}": "NAME of .* variable .*put it",
    "teacher.endpoint={url: 'http://x/v1', spending_limit: 5}": "must have both prices .*Set",
    f"teacher.endpoint={{url: 'http://x/v1', {PRICES}}}": "without a limit spending .*Set",
    f"teacher.endpoint={{url: 'http://x/v1', {PRICES}, spending_limit: 0}}": "greater than 0",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_cannot_work(option, recipe, refused):
    run = open_run(load_config(recipe))  # and so what is refused must leave a run alone
    run.record(stage="sampling", rows=3)
    line = refused("run", recipe, option)
    assert option.partition("=")[0] in line
    assert re.search(OPTIONS[option], line)


def test_another_recipe_than_the_folders(recipe, refused):
    open_run(load_config(recipe))
    line = refused("run", recipe, "training.epochs=3")
    assert "training.epochs was 5 and is now 3. Set run.folder to a new folder" in line


@pytest.mark.parametrize("option", ["run.folder", "run.store", "task.data", "student.model"])
def test_a_bucket_without_credentials(option, recipe, refused, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()  # which may remember those of another test
    line = refused("run", recipe, f"{option}=s3://bucket/of/mine.jsonl")
    assert re.search("s3://bucket/of/mine.jsonl.*[Cc]heck the URL, the credentials", line)
    assert "Unable to locate credentials" in line


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        (401, "", "refuses the key.* Put a valid one into the environment variable OPENAI_API_KEY"),
        (500, "", "is out of order: .*Try later"),
        (("other",), "", "has no model 'big', only other: give one of these"),
        (("big",), ", api_key_env: NO_KEY", "api_key_env=NO_KEY is not set .*export NO_KEY"),
        (None, "", "nothing answers at .*: check the URL"),
    ],
    ids=["a wrong key", "out of order", "another model", "no key", "nobody"],
)
def test_an_endpoint_that_would_not_answer(models, options, words, recipe, refused, chat_server):
    url = chat_server(models=models).url if models else "http://127.0.0.1:9/v1"
    endpoint = f"teacher.endpoint={{url: '{url}'{options}}}"
    line = refused("run", recipe, "teacher.model=big", endpoint)
    assert re.search(words, line)


# What the file says, and the words of the error.
TEXTS = {
    "no YAML": (b"run: [1", "is not valid YAML"),
    "a list": (b"- run", "holds list, expected sections"),
    "nothing": (b"", "holds NoneType, expected sections"),
    "Latin-1": ("run: {folder: Läufe}".encode("latin-1"), "is not valid YAML"),
    "an object of Python": (b"run: !!python/object/apply:os.system [exit]", "not valid YAML"),
    "a section twice": (b"run: {folder: a}\nrun: {folder: b}", "'run' is there twice"),
    "a missing section": (b"run: {folder: a}", "task is missing: set it"),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_configuration_that_cannot_be_read(command, text, recipe, refused):
    content, words = TEXTS[text]
    recipe.write_bytes(content)
    line = refused(command, recipe)
    assert "recipe.yaml" in line
    assert words in line


TABLE = "title: T\nrecipe: recipe.yaml\nfolder: tables\ntasks: {one: {}}\n"
TABLES = {
    "no table": (b"title: [", "is not valid YAML"),
    "no arms": (f"{TABLE}blocks: []".encode(), "blocks=[]: tuple should have at least 1 item"),
    "an unknown arm": (f"{TABLE}blocks: [{{student: S, arms: [best]}}]".encode(), "'best'"),
    "Latin-1": ("title: für alle".encode("latin-1"), "is not valid YAML"),
}


@pytest.mark.parametrize("fault", TABLES)
def test_a_table_that_cannot_be_filled(fault, recipe, refused):
    content, words = TABLES[fault]
    (recipe.parent / "table.yaml").write_bytes(content)
    assert words in refused("table", "table.yaml")


EVAL = ("eval", "--task", "gsm8k", "--data", "data/test.jsonl", "--model")
PRUNE = ("models", "prune", "student", "--ratio")
COMMANDS = {
    ("run", "nowhere.yaml"): "no configuration at nowhere.yaml: give the path of a YAML file",
    ("run", "recipe.yaml", "epochs"): "'epochs' is not of the form section.key=value, such as",
    ("run", "recipe.yaml", "--arm", "best"): "'best' is not known: .*mixed_policy_orpo",
    ("status", "nowhere"): "no run in .*nowhere: expected config.yaml there; give a run's folder",
    ("report", "data"): "no run in .*data: expected config.yaml there; give a run's folder",
    ("serve", "data"): "no run in .*data: expected config.yaml there; give a run's folder",
    ("serve", "spoilt"): "spoilt/config.yaml is damaged .*put the recipe .* in its place",
    ("ask", "Why?", "--url", "localhost:8000"): "--url localhost:8000 is no base URL: expected",
    ("ask", "Why?", "--url", "http://127.0.0.1:9/v1"): "nothing answers at .*potstill serve RUN",
    ("ask", "Why?", "--kind", "why"): "kind='why': expected number, choice, boolean or open",
    (*EVAL, "http://127.0.0.1:port"): "is no base URL: expected one such as http://127",
    (*EVAL, "nowhere/at/all"): "no model 'nowhere/at/all': expected a folder that exists",
    (*EVAL, "student", "--prompts", "99"): "99 prompts asked of .*which has 5: ask for at most",
    (*EVAL, "student", "--answers", "recipe.yaml/a"): "recipe.yaml is a file: give another",
    (*PRUNE, "1.5", "--out", "out"): "ratio=1.5: expected a share .*above 0 and below 1",
    (*PRUNE, "nan", "--out", "out"): "ratio=nan: expected a share .*above 0 and below 1",
    (*PRUNE, "0.2", "--out", "data"): "data already holds something: give a new or an empty folder",
    (*PRUNE, "0.2", "--out", "recipe.yaml/x"): "recipe.yaml is a file: give another",
    ("models", "prepare", "student"): "student needs no preparing: .*name it as it is",
    ("models", "prepare", "miniature-teacher", "--out", "recipe.yaml"): "is a file: give another",
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_that_cannot_work(command, recipe, refused):
    (recipe.parent / "spoilt").mkdir()
    (recipe.parent / "spoilt" / "config.yaml").write_text("run: [")
    assert re.search(COMMANDS[command], refused(*command))


def test_a_port_that_another_listens_on(recipe, refused):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        open_run(load_config(recipe, [f"serving.port={port}"]))
        words = f"port={port} cannot be listened on .*set serving.port to a free one"
        assert re.search(words, refused("serve", "run"))
        assert re.search(words, refused(*EVAL, "student", "--port", port))
        assert re.search(words, refused("run", recipe, f"serving.port={port}"))
