"""The endpoint as an application that Ray Serve deploys from a file; starts no Ray."""

from dataclasses import replace

import pytest
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.deployment import Application

from cluster.config import parse_config
from cluster.errors import BadInputError
from serving import deployment
from serving.models import ServedModel

BASE = ServedModel("base", "/models/a", stop_token_ids=(2,))
STUDENT = replace(BASE, model_id="student", reference="s3://bucket/checkpoints/epoch_002")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run, as far as its endpoint asks."""
    raw = {
        "run": {"folder": str(tmp_path)},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
    }
    config = parse_config(raw, "test").model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("POTSTILL_API_KEY", "a-key")
    monkeypatch.setattr(deployment, "served_models", lambda run, config: [BASE, STUDENT])
    return str(tmp_path)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What the application is asked to be made of; the real one needs a running Ray."""
    told = []

    def application(models, config):
        told.append(([model.model_id for model in models], config))
        return serve.deployment(type("Ingress", (), {})).bind()

    monkeypatch.setattr(deployment, "application", application)
    return told


@pytest.mark.parametrize(
    ("args", "models"),
    [({}, ["base", "student"]), ({"models": ["student"]}, ["student"])],
)
def test_ray_serve_gets_an_application_of_the_chosen_models(run, asked, args, models):
    app = call_user_app_builder_with_args_if_necessary(deployment.build, {"run": run, **args})
    assert isinstance(app, Application)
    assert [served for served, _ in asked] == [models]


def test_it_does_not_start_without_a_key(run, monkeypatch):
    monkeypatch.delenv("POTSTILL_API_KEY")
    with pytest.raises(BadInputError, match="POTSTILL_API_KEY"):
        deployment.build(deployment.Deployed(run=run))


def test_it_listens_to_other_machines_and_waits_for_gpus_that_are_not_up_yet(run, asked):
    deployment.build(deployment.Deployed(run=run))
    ((_, config),) = asked
    assert (config.serving.host, config.cluster.accelerator) == ("0.0.0.0", "gpu")


def test_a_model_that_the_run_does_not_have_is_refused(run, asked):
    with pytest.raises(BadInputError, match=r"args\.models has pupil, but .* has base, student"):
        deployment.build(deployment.Deployed(run=run, models=("student", "pupil")))
    assert asked == []


@pytest.mark.parametrize("wrong", [{"acelerator": "cpu"}, {"models": []}, {"accelerator": "tpu"}])
def test_a_wrong_argument_is_refused(run, wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        call_user_app_builder_with_args_if_necessary(deployment.build, {"run": run, **wrong})


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="no run in"):
        deployment.build(deployment.Deployed(run=str(tmp_path / "none")))
