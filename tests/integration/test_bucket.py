"""A whole run whose folder and store lie in a bucket, on storage that fails every now and then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.publishing import is_published
from cluster.run_folder import RunFolder
from cluster.storage import location
from pipeline.store import SampleStore
from tests.buckets import FlakyStorage, serving
from tests.integration.runs import write_problems

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PROJECT = Path(__file__).parents[2]
PROMPTS = {"train": 12, "validation": 4, "test": 4}
SAMPLES = 4


@pytest.fixture
def storage(monkeypatch):
    flaky = FlakyStorage()
    with serving(flaky, monkeypatch):
        yield flaky


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
