"""A whole run in a bucket that lists late, killed in its sampling: as one that was left alone."""

from collections import Counter

import pyarrow.parquet as pq
import pytest

from cluster.run_folder import RunFolder
from cluster.storage import location
from tests.buckets import LateStorage, objects, serving
from tests.integration.bucket_runs import PROMPTS, SAMPLES, write_bucket_recipe
from tests.integration.runs import go

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault,
    pytest.mark.long,
    pytest.mark.timeout(1500),
]
LATE_S = 60.0  # longer than any stage here


@pytest.fixture
def storage(monkeypatch):
    late = LateStorage(LATE_S)
    with serving(late, monkeypatch):
        yield late


def finished_files() -> list[str]:
    """Files of the store that have their markers."""
    found = [name for name in objects() if name.startswith("store/samples/")]
    return [name.removesuffix(".ok") for name in found if name.endswith(".ok")]


def keys_by_model() -> dict[str, Counter[str]]:
    """How often each key is stored, for each model."""
    found: dict[str, Counter[str]] = {}
    for name in finished_files():
        file = location(f"s3://bucket/{name}")
        keys = pq.read_table(file.path, filesystem=file.fs)["key"].to_pylist()
        found.setdefault(name.split("/")[2], Counter()).update(keys)
    return found


def test_a_run_killed_in_a_bucket_that_lists_late_loses_and_doubles_nothing(
    storage, guesser, free_port, tmp_path
):
    recipe = write_bucket_recipe(tmp_path / "home", guesser, free_port())
    # Few rows a batch and one batch at a time, so that there is time to kill it between two.
    slowly = ("engines.batch_rows=4", "engines.batches_in_flight=1")
    killed = go(recipe, slowly, until=lambda _: len(finished_files()) >= 2)
    assert killed.code < 0, killed.screen
    drawn = sum(len(keys) for keys in keys_by_model().values())
    assert 0 < drawn < PROMPTS["train"] * SAMPLES, "it was killed in its sampling"
    ended = go(recipe, slowly)
    assert ended.code == 0, ended.screen
    assert "samples reused" in ended.screen
    assert storage.wrong > 20, "it did not list late"

    stored = keys_by_model()
    assert [key for keys in stored.values() for key, times in keys.items() if times > 1] == []
    # The base student is the teacher: it has its traces, and one greedy answer to each test prompt.
    # The students answer the validation prompts too; the last one writes no traces.
    traces, answers = PROMPTS["train"] * SAMPLES, PROMPTS["validation"] + PROMPTS["test"]
    counts = sorted(len(keys) for keys in stored.values())
    assert counts == [answers, traces + PROMPTS["test"], traces + answers]
    run = RunFolder(location("s3://bucket/run"))
    assert run.epochs_published() == 2
    steps = [line["step"] for line in run.records() if line["stage"] == "train"]
    assert steps == [*range(1, 11)]
    assert run.saved_steps() == []

    again = go(recipe, slowly)
    assert again.code == 0, again.screen
    assert "nothing to train" in again.screen
    assert "6 of 6 results reused" in again.screen
    assert keys_by_model() == stored, "nothing was drawn again"
