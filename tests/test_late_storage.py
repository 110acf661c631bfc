"""A bucket that lists late: nothing is overlooked, drawn twice, or taken for what is gone."""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from cluster.ledger import Ledger
from cluster.publishing import (
    discard_folder,
    fetch_folder,
    is_published,
    publishing,
    read_published,
)
from cluster.run_folder import RunFolder
from cluster.sections import Endpoint
from cluster.soundness import set_aside_damaged
from cluster.storage import location, write_json, write_table
from pipeline.account import Account, PaidBatch
from pipeline.missing import sample_missing
from pipeline.rows import Sample, Wanted
from pipeline.store import SampleStore
from tests.buckets import objects
from training.optimizer_state import discard_states, newest_state

pytestmark = pytest.mark.fault


@pytest.fixture
def run(late_storage):
    return RunFolder(location("s3://bucket/run"))


def store():
    """The store as a process of its own would open it."""
    return SampleStore(location("s3://bucket/store"))


def sample(key):
    return Sample(key, "p", 0, "m", f"text of {key}", "stop", 3)


def rows_of_all_files():
    return [key for table in store()._tables("m", ["key"]) for key in table["key"].to_pylist()]


def publish(folder, **texts):
    with publishing(folder) as staging:
        for name, text in texts.items():
            (staging / name).write_text(text)


def marks():
    return [key for key in objects() if key.endswith(".ok")]


def test_what_another_process_has_just_written_is_found(late_storage):
    store().write([sample("a"), sample("b")], {"run": "r"})
    assert store().keys("m") == {"a", "b"}
    assert store().read("m", {"b", "z"}) == {"b": sample("b")}
    assert list(store().notes("m")) == [{"run": "r"}]
    assert late_storage.wrong, "it did list late"


def test_nothing_is_lost_where_many_write_at_once(late_storage):
    keys = [f"key {number}" for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store().write([sample(key)]), keys))
    assert sorted(rows_of_all_files()) == sorted(keys)


def test_a_run_that_was_killed_draws_only_the_rest(late_storage):
    wanted = [Wanted(f"key {number}", "p", number) for number in range(9)]

    def draw_until_killed(missing):
        for request in missing[:4]:
            store().write([sample(request.key)])
        raise KeyboardInterrupt

    def draw(missing):
        store().write(sample(request.key) for request in missing)
        return []

    with pytest.raises(KeyboardInterrupt):
        sample_missing("teacher", "m", wanted, draw_until_killed, store(), 0.0)
    found = sample_missing("teacher", "m", wanted, draw, store(), 0.0)
    assert [row.key for row in found] == [request.key for request in wanted]
    assert sorted(rows_of_all_files()) == [request.key for request in wanted], "no loss, no doubles"
    late_storage.freeze()
    assert sorted(rows_of_all_files()) == [request.key for request in wanted]


def test_a_file_that_a_killed_process_did_not_finish_never_counts(late_storage):
    store().write([sample("a")])
    late_storage.freeze()
    location(f"s3://bucket/{marks()[0]}").unlink()
    assert store().keys("m") == set()


def test_a_file_never_counts_before_it_can_be_found(late_storage, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        store().write([sample("a")])
    late_storage.freeze()  # else it would be drawn again, and be there twice in the end
    assert store().keys("m") == set()


def test_a_file_that_was_set_aside_is_not_missed_for_long(late_storage, capsys):
    store().write([sample("a")])
    file = location(f"s3://bucket/{marks()[0].removesuffix('.ok')}")
    late_storage.freeze()
    file.write_bytes(b"damaged")
    assert store().keys("m") == set()
    assert store().keys("m") == set(), "still listed"
    assert capsys.readouterr().out.count("set aside") == 1
    store().write([sample("a")])
    assert rows_of_all_files() == ["a"]


def test_what_a_run_has_published_is_not_overlooked(run, late_storage, tmp_path):
    table = pa.table({"x": [1, 2]})
    with publishing(run.pairs(1)) as folder:
        write_table(table, location(str(folder / "pairs.parquet")))
    publish(run.checkpoint(1), weights="w")
    write_json(run.evaluation("base_test"), {"accuracy": 1})
    assert is_published(run.pairs(1))
    assert read_published(run.pairs(1)).equals(table)
    assert run.epochs_published() == 1
    assert run.evaluation("base_test").exists()
    assert (fetch_folder(run.checkpoint(1), tmp_path) / "weights").read_text() == "w"
    assert late_storage.wrong


def save(run, step):
    run.announce_state(step)
    publish(run.trainer_state(step), moments=f"of {step}")


def test_training_goes_on_from_a_state_of_a_moment_ago(run):
    save(run, 3)
    save(run, 6)
    assert newest_state(run, limit=9) == 6
    run.announce_state(9)  # and killed before it was published
    assert newest_state(run, limit=9) == 6


def test_a_state_that_is_gone_is_neither_taken_nor_damaged(run, late_storage, capsys):
    save(run, 3)
    late_storage.freeze()
    save(run, 6)
    discard_states(run, before=6)
    assert run.saved_steps() == [6]
    discard_states(run, before=7)
    assert newest_state(run, limit=9) == 0
    assert "damaged" not in capsys.readouterr().out
    assert [key for key in objects() if "/step_" in key] == [], "also what is not listed goes"


def test_what_is_listed_and_gone_is_not_damaged(run, late_storage, capsys):
    publish(run.checkpoint(1), weights="w")
    publish(run.pairs(1), rows="r")
    write_table(pa.table({"x": [1]}), run.completions("teacher"))
    late_storage.freeze()
    discard_folder(run.checkpoint(1))
    discard_folder(run.pairs(1))
    run.completions("teacher").unlink()
    set_aside_damaged(run)
    assert capsys.readouterr().out == ""


def test_a_damaged_state_counts_no_more_before_it_is_listed(run):
    save(run, 3)
    save(run, 6)
    (run.trainer_state(6) / "moments").write_text("damaged")
    assert newest_state(run, limit=9) == 3
    assert run.saved_steps() == [3]


def test_what_a_teacher_has_just_been_paid_counts(late_storage):
    section = Endpoint(url="https://a.example/v1")
    account = Account(store(), "m", "s3://bucket/run", "teacher", section)
    batch = PaidBatch(account)
    batch.add(sample("a"), prompt_tokens=20)
    batch.write()
    assert account.tokens() == (20, 3)


def test_files_of_a_killed_try_do_not_enter_a_folder_that_is_published_later(run):
    half = run.pairs(1) / "half.parquet"
    write_table(pa.table({"x": [7]}), half)
    with publishing(run.pairs(1)) as folder:
        write_table(pa.table({"x": [1]}), location(str(folder / "pairs.parquet")))
    assert half.exists(), "it was not listed"
    assert read_published(run.pairs(1))["x"].to_pylist() == [1]
