"""A whole run whose folder and store lie in a bucket, on storage that fails every now and then."""

import pytest

from cluster.publishing import is_published
from cluster.run_folder import RunFolder
from cluster.storage import location
from pipeline.store import SampleStore
from tests.buckets import FlakyStorage, serving
from tests.integration.bucket_runs import PROMPTS, SAMPLES, write_bucket_recipe
from tests.integration.runs import PROJECT, go

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault,
    pytest.mark.long,
    pytest.mark.timeout(900),
]


@pytest.fixture
def storage(monkeypatch):
    flaky = FlakyStorage()
    with serving(flaky, monkeypatch):
        yield flaky


@pytest.fixture
def recipe(guesser, free_port, tmp_path):
    return write_bucket_recipe(tmp_path / "home", guesser, free_port())


def test_a_run_in_a_bucket_survives_storage_that_refuses_and_stalls(storage, recipe, measured):
    before = set(PROJECT.iterdir())
    ended = go(recipe)
    assert ended.code == 0, ended.screen
    measured(f"a bucket that refused {storage.refused} requests: {ended.seconds:.0f} s")
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
    again = go(recipe)
    assert again.code == 0, again.screen
    assert "nothing to train" in again.screen
    assert "6 of 6 results reused" in again.screen
    assert set(PROJECT.iterdir()) == before, "nothing of it lies on this disk"
