"""Odd input that libraries answer in their own ways: one clear error of ours in their place."""

import json
import shutil
import socket

import pytest

from cluster.errors import BadInputError
from cluster.headers import weight_shapes
from cluster.jobs.server import resolve_address
from cluster.recipes import load_recipe
from cluster.session import _refuse_silence
from evals.tables.spec import load_table
from pipeline.chat import load_chat
from pipeline.verdicts.function import load_function


@pytest.mark.parametrize(
    "text", ["run: {folder: 2026-02-30}", "run: {seed: !!int abc}", "[" * 3000], ids=str.strip
)
def test_what_yaml_cannot_read_is_one_error(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for load in (load_recipe, load_table):
        with pytest.raises(BadInputError, match="is not valid YAML"):
            load(path)


def test_a_verdicts_file_that_exits_does_not_end_the_run_as_a_success(tmp_path):
    (tmp_path / "mine.py").write_text("import sys; sys.exit(0)")
    with pytest.raises(BadInputError, match="cannot be imported"):
        load_function(f"{tmp_path}/mine.py:right")


def test_a_cluster_that_is_not_there_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        _refuse_silence(address)
    with pytest.raises(BadInputError, match=f"answers at cluster.address='{address}"):
        _refuse_silence(address)
    for other in ("auto", "local", "ray://127.0.0.1:1"):
        _refuse_silence(other)


def test_a_job_servers_address_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(BadInputError) as refused:
        resolve_address("http://me:planted@host:8265")
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/tmp/weights.safetensors", 3])
def test_weights_lie_in_their_models_folder(tmp_path, name):
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInputError, match="which is no file of that folder"):
        weight_shapes(tmp_path)


def test_a_template_that_fails_is_the_templates_fault(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    chat = load_chat(tmp_path / "model", "{{ 1 // 0 }}")
    with pytest.raises(BadInputError, match="cannot be rendered"):
        chat.prompt_ids("hi")
