"""A finished run's student as an application that Ray Serve is handed, as a RayService does it."""

import shutil

import pytest
import yaml

from cluster import storage
from cluster.config import parse_config
from cluster.publishing import publish_folder, staging_folder
from cluster.run_folder import RunFolder
from cluster.session import ray_session, start_serve
from serving.deployment import build

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


@pytest.fixture
def config(guesser, free_port, tmp_path):
    raw = {
        "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        "task": {"name": "word_problems"},
        "teacher": {"model": str(guesser)},
        "student": {"model": str(guesser)},
        "training": {"epochs": 1},
        "serving": {"port": free_port(), "max_model_len": 512, "kv_cache_gib": 0.1},
        "evaluation": {"max_new_tokens": 48},
    }
    return parse_config(raw, "test")


@pytest.fixture
def run(config, guesser):
    """A run with its configuration and one checkpoint."""
    run = RunFolder(storage.location(config.run.folder))
    folder = staging_folder(run.checkpoint(1))
    shutil.copytree(guesser, folder, dirs_exist_ok=True)
    publish_folder(folder, run.checkpoint(1))
    storage.write_text(run.config_file, yaml.safe_dump(config.model_dump(mode="json")))
    return run


def test_the_student_of_a_run_answers_where_ray_serve_builds_the_application(
    run, config, monkeypatch
):
    import openai
    from ray import serve
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    monkeypatch.setenv("POTSTILL_API_KEY", "a-key")
    args = {"run": str(run.root), "models": ["student"], "accelerator": "cpu"}
    with ray_session(config):
        start_serve(config)
        app = call_user_app_builder_with_args_if_necessary(build, args)
        serve.run(app, name="potstill", route_prefix="/")
        url = f"http://127.0.0.1:{config.serving.port}/v1"
        with openai.OpenAI(base_url=url, api_key="a-key") as client:
            assert [model.id for model in client.models.list()] == ["student"]
            answer = client.chat.completions.create(
                model="student",
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=8,
                temperature=0,
            )
        assert answer.model == "student"
        assert answer.choices[0].message.content
        serve.delete("potstill")
