"""A whole run whose folder and store lie in a bucket, on storage that fails every now and then."""

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

from cluster.publishing import is_published
from cluster.run_folder import RunFolder
from cluster.storage import location
from pipeline.store import SampleStore
from tests.integration.runs import write_problems

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PROJECT = Path(__file__).parents[2]
PROMPTS = {"train": 12, "validation": 4, "test": 4}
SAMPLES = 4


class FlakyStorage:
    """S3 that refuses every ninth request, and lets every thirtieth wait."""

    def __init__(self) -> None:
        self._storage = DomainDispatcherApplication(create_backend_app)
        self._count = itertools.count(1)
        self.refused = self.stalled = 0

    def __call__(self, environ, start_response):
        number = next(self._count)
        if number % 9 == 0:
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("content-type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"]
        if number % 30 == 0:
            self.stalled += 1
            time.sleep(1)
        return self._storage(environ, start_response)


@pytest.fixture
def storage(monkeypatch):
    """Storage with an empty bucket, at the address that all processes of a run find."""
    S3FileSystem.clear_instance_cache()
    flaky = FlakyStorage()
    server = make_server("127.0.0.1", 0, flaky, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield flaky
    server.shutdown()


@pytest.fixture
def recipe(guesser, free_port, tmp_path):
    """A run of two epochs on problems whose answers are 3 or 8."""
    write_problems(tmp_path, PROMPTS)
    section = {"model": str(guesser), "dtype": "float32"}
    engines = {"max_model_len": 256, "kv_cache_gib": 0.2, "enforce_eager": True, "batch_rows": 8}
    config = {
        "run": {"folder": "s3://bucket/run", "store": "s3://bucket/store"},
        "task": {"name": "gsm8k", "data": str(tmp_path)},
        "teacher": section,
        "student": section,
        "sampling": {"samples": SAMPLES, "max_new_tokens": 40, "max_rouge_l": 0.99},
        "training": {
            "epochs": 2,
            "steps_per_epoch": 5,
            "global_batch": 2,
            "micro_batch": 2,
            "max_length": 256,
            "precision": "fp32",
            "threads_per_worker": 1,
        },
        "engines": engines,
        "evaluation": {"through": "engines"},
        "serving": {"port": free_port()},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "recipe.yaml"


def run(recipe):
    command = [sys.executable, "potstill.py", "run", str(recipe)]
    environment = {**os.environ, "POTSTILL_CACHE": str(recipe.parent / "cache")}
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_a_run_in_a_bucket_survives_storage_that_refuses_and_stalls(storage, recipe):
    before = set(PROJECT.iterdir())
    ended = run(recipe)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert storage.refused > 20, "it was not flaky"
    assert storage.stalled > 5
    folder = RunFolder(location("s3://bucket/run"))
    assert is_published(folder.checkpoint(2))
    assert folder.saved_steps() == [], "trainer's states are needed no more"
    assert [line["step"] for line in folder.records() if line["stage"] == "train"] == [
        *range(1, 11)
    ]
    assert not (folder.root / ".lock").exists()
    store = SampleStore(location("s3://bucket/store"))
    models = [place.name for place in (store.root / "samples").iterdir()]
    assert max(len(store.keys(model)) for model in models) >= PROMPTS["train"] * SAMPLES
    again = run(recipe)
    assert again.returncode == 0
    assert "nothing to train" in again.stdout
    assert "6 of 6 results reused" in again.stdout
    assert set(PROJECT.iterdir()) == before, "nothing of it lies on this disk"
