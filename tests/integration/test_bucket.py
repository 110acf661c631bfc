"""Whole runs whose folder and store lie in a bucket that fails, stalls or lists late."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cluster.publishing import is_published
from cluster.run_folder import RunFolder
from cluster.storage import location
from tests.buckets import FlakyStorage, LateStorage, objects, serving
from tests.integration.runs import PROJECT, Recipe, go, write_problems

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault,
    pytest.mark.long,
    pytest.mark.timeout(1500),
]
PROMPTS = {"train": 12, "validation": 4, "test": 4}
SAMPLES = 4
LATE_S = 60.0  # longer than any stage here
# Few rows a batch and one batch at a time, so that there is time to kill a run between two.
SLOWLY = ("engines.batch_rows=4", "engines.batches_in_flight=1")


def write_small_recipe(home: Path, model: Path, port: int, place: str) -> Recipe:
    """A run of two epochs on problems whose answers are 3 or 8."""
    home.mkdir(exist_ok=True)
    write_problems(home / "data", PROMPTS)
    section = {"model": str(model), "dtype": "float32"}
    engines = {"max_model_len": 256, "kv_cache_gib": 0.2, "enforce_eager": True, "batch_rows": 8}
    config = {
        "run": {"folder": f"{place}/run", "store": f"{place}/store"},
        "task": {"name": "gsm8k", "data": str(home / "data")},
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
        "serving": {"port": port},
    }
    recipe = Recipe(home / "recipe.yaml")
    recipe.file.write_text(yaml.safe_dump(config))
    return recipe


@pytest.fixture(scope="module")
def undisturbed(guesser, free_port, tmp_path_factory) -> Recipe:
    """The same run on a disk, which nothing disturbs."""
    home = tmp_path_factory.mktemp("undisturbed")
    recipe = write_small_recipe(home, guesser, free_port(), str(home))
    ended = go(recipe)
    assert ended.code == 0, ended.screen
    return recipe


@pytest.fixture
def recipe(guesser, free_port, tmp_path) -> Recipe:
    return write_small_recipe(tmp_path / "home", guesser, free_port(), "s3://bucket")


def finished_files() -> list[str]:
    """Files of the store that have their markers."""
    found = [name for name in objects() if name.startswith("store/samples/")]
    return [name.removesuffix(".ok") for name in found if name.endswith(".ok")]


def keys() -> Counter[str]:
    """How often each key is stored."""
    found: Counter[str] = Counter()
    for name in finished_files():
        file = location(f"s3://bucket/{name}")
        found.update(pq.read_table(file.path, filesystem=file.fs)["key"].to_pylist())
    return found


def assert_as_undisturbed(undisturbed: Recipe) -> None:
    """No sample is lost or there twice; pairs, steps and losses are the same."""
    assert keys() == Counter(undisturbed.keys())
    run = RunFolder(location("s3://bucket/run"))
    for epoch in (1, 2):
        file = run.pairs(epoch) / "pairs.parquet"
        pairs = pq.read_table(file.path, filesystem=file.fs)
        theirs = undisturbed.run / f"pairs/epoch_{epoch:03d}/pairs.parquet"
        assert pairs.equals(pq.read_table(theirs))
    trained = [line for line in run.records() if line["stage"] == "train"]
    assert [line["step"] for line in trained] == [*range(1, 11)]
    assert {line["step"]: line["loss"] for line in trained} == pytest.approx(
        undisturbed.losses(1) | undisturbed.losses(2), abs=1e-6
    )
    assert is_published(run.checkpoint(2))
    assert run.saved_steps() == [], "trainer's states are needed no more"
    assert not (run.root / ".lock").exists()


def assert_left_as_it_is(recipe: Recipe) -> None:
    before = keys()
    again = go(recipe)
    assert again.code == 0, again.screen
    assert "nothing to train" in again.screen
    assert "6 of 6 results reused" in again.screen
    assert keys() == before, "nothing was drawn again"


def test_a_run_survives_storage_that_refuses_and_stalls(undisturbed, recipe, monkeypatch, measured):
    before, storage = set(PROJECT.iterdir()), FlakyStorage()
    with serving(storage, monkeypatch):
        ended = go(recipe)
        assert ended.code == 0, ended.screen
        measured(f"a bucket that refused {storage.refused} requests: {ended.seconds:.0f} s")
        assert storage.refused > 20, "it was not flaky"
        assert storage.stalled > 5
        assert_as_undisturbed(undisturbed)
        assert_left_as_it_is(recipe)
    assert set(PROJECT.iterdir()) == before, "nothing of it lies on this disk"


def test_a_run_killed_while_listings_are_late_loses_and_doubles_nothing(
    undisturbed, recipe, monkeypatch
):
    storage = LateStorage(LATE_S)
    with serving(storage, monkeypatch):
        killed = go(recipe, SLOWLY, until=lambda _: len(finished_files()) >= 2)
        assert killed.code < 0, killed.screen
        assert 0 < len(keys()) < PROMPTS["train"] * SAMPLES, "it was killed in its sampling"
        ended = go(recipe, SLOWLY)
        assert ended.code == 0, ended.screen
        assert "samples reused" in ended.screen
        assert storage.wrong > 20, "it did not list late"
        assert_as_undisturbed(undisturbed)
        assert_left_as_it_is(recipe)
