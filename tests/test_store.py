"""The sample store: whole files, found by key, damage detected."""

from dataclasses import replace

import pytest

from cluster.storage import location
from pipeline.rows import Sample
from pipeline.store import SampleStore

pytestmark = pytest.mark.fault


@pytest.fixture
def store(tmp_path):
    return SampleStore(location(str(tmp_path / "store")))


def sample(key: str, model: str = "m") -> Sample:
    return Sample(key, "p", 0, model, f"text of {key}", "stop", 3)


def files(tmp_path, suffix=".parquet"):
    return sorted((tmp_path / "store" / "samples" / "m").glob(f"*{suffix}"))


def test_samples_are_found_by_key(store):
    store.write([sample("a"), sample("b")])
    store.write([sample("c")])
    assert store.keys("m") == {"a", "b", "c"}
    assert store.read("m", {"a", "c", "z"}) == {"a": sample("a"), "c": sample("c")}


def test_models_are_kept_apart(store):
    store.write([sample("a", "m")])
    store.write([sample("b", "n")])
    assert store.keys("m") == {"a"}
    assert store.keys("unknown") == set()


def test_a_note_stays_with_its_file_and_changes_no_sample(store):
    store.write([sample("a")], {"run": "r", "tokens": "3"})
    store.write([sample("b")])
    assert sorted(store.notes("m"), key=len) == [{}, {"run": "r", "tokens": "3"}]
    assert store.read("m", {"a", "b"}) == {"a": sample("a"), "b": sample("b")}


def test_of_two_rows_with_one_key_the_first_counts_also_later(store):
    for text in ("first", "second", "third", "fourth"):
        store.write([replace(sample("a"), text=text)])
        assert store.read("m", {"a"})["a"].text == "first"


def test_a_file_without_an_entry_in_the_ledger_counts_too(store, tmp_path):
    store.write([sample("a")])
    (entry,) = (tmp_path / "store" / "samples" / "m" / "ledger").iterdir()
    entry.write_text("")  # cut short by a kill
    assert store.keys("m") == {"a"}


def test_writing_nothing_leaves_nothing(store, tmp_path):
    store.write([])
    assert not (tmp_path / "store").exists()


def test_a_file_without_its_marker_does_not_count(store, tmp_path):
    store.write([sample("a")])
    files(tmp_path, ".ok")[0].unlink()
    assert store.keys("m") == set()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-10], lambda _: b"", lambda data: data[::-1]]
)
def test_a_damaged_file_is_set_aside_and_its_samples_are_missing(store, tmp_path, damage, capsys):
    store.write([sample("a")])
    store.write([sample("b")])
    spoiled = next(path for path in files(tmp_path) if b"text of a" in path.read_bytes())
    spoiled.write_bytes(damage(spoiled.read_bytes()))
    assert store.keys("m") == {"b"}
    assert "damaged" in capsys.readouterr().out
    assert len(list(spoiled.parent.glob(f"{spoiled.name}.damaged-*"))) == 1
    store.write([sample("a")])
    assert store.keys("m") == {"a", "b"}
