"""No decision goes by the clock on the wall, which others set and which jumps."""

import ast
import itertools
import json
import time
from pathlib import Path

import pytest

from cluster import lock, metrics, progress
from cluster.errors import BadInputError, EngineNotReadyError
from cluster.lock import locked
from cluster.metrics import StepLog, read_records
from cluster.storage import location
from pipeline.account import Account, PaidBatch
from pipeline.fan_out import ask_patiently
from pipeline.rows import Sample
from pipeline.store import SampleStore
from training.worker import Worker

pytestmark = pytest.mark.fault

PROJECT = Path(__file__).parents[1]
FOLDERS = ("cluster", "pipeline", "training", "serving", "evals")
YEAR_S = 365 * 24 * 3600.0
# Calls that read the clock on the wall, and the files that write down a date for people.
WALL = {("time", "time"), ("time", "time_ns"), ("time", "localtime"), ("time", "gmtime")}
WALL |= {("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("date", "today")}
DATES = {"evals/accuracy.py": 1, "evals/runs.py": 1}


def wall_clock_reads(source):
    """How often a module reads the clock on the wall."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += (node.value.id, node.attr) in WALL
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            found += any(("time", alias.name) in WALL for alias in node.names)
    return found


def test_only_dates_for_people_are_read_from_the_wall():
    files = [file for folder in FOLDERS for file in (PROJECT / folder).rglob("*.py")]
    files.append(PROJECT / "potstill.py")
    reads = {str(f.relative_to(PROJECT)): wall_clock_reads(f.read_text()) for f in files}
    assert {file: count for file, count in reads.items() if count} == DATES


@pytest.mark.parametrize("source", ["import time\ntime.time()", "from time import time\ntime()"])
def test_a_look_at_the_wall_is_seen(source):
    assert wall_clock_reads(source)


@pytest.fixture(autouse=True)
def jumping_clock(monkeypatch):
    """A clock on the wall that jumps back a year, and forth again, each time it is looked at."""
    now, jumps = time.time(), itertools.cycle((0.0, -YEAR_S))
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))


def sample(key):
    return Sample(key, "p", 0, "m", "text", "stop", 3)


def test_the_store_keeps_order_and_loses_nothing(bucket):
    store = SampleStore(location(f"{bucket}/store"))
    for key in "abc":
        store.write([sample(key)])
    assert store.keys("m") == set("abc")
    keys = [table["key"].to_pylist() for table in store._tables("m", ["key"])]
    assert keys == [["a"], ["b"], ["c"]]


def test_the_lock_of_a_dead_holder_is_taken_and_that_of_a_living_one_is_not(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_S", 0.1)
    place = location(f"{bucket}/run/.lock")
    place.write_text(json.dumps({"id": "gone", "beats": 7}))
    started = time.monotonic()
    with locked(place.parent):
        assert time.monotonic() - started >= 0.4, "it was watched"
    beats = ({"id": "living", "beats": number} for number in itertools.count())
    monkeypatch.setattr(lock._Beating, "_read", lambda _: next(beats))
    with pytest.raises(BadInputError, match="works in"), locked(place.parent):
        pass


def test_steps_are_written_every_few_seconds_of_the_monotonic_clock(tmp_path, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = StepLog(location(f"memory://{tmp_path.name}/metrics.jsonl"))
    for step, seen in ((1, 1), (2, 1), (3, 1), (4, 4)):
        now[0] += 2 if step > 1 else 0
        log.add(step=step)
        assert len(read_records(log._file)) == seen


def test_a_state_is_due_after_minutes_of_the_monotonic_clock(monkeypatch):
    trainer = object.__new__(Worker)
    trainer.first = True
    trainer.saved_at = trainer.looked_at = time.monotonic()
    trainer.training = type("Training", (), {"save_minutes": 30})
    trainer._is_to_leave = lambda: False
    assert not trainer._wishes().save
    trainer.saved_at -= 30 * 60
    assert trainer._wishes().save


def test_an_engine_that_is_replaced_is_asked_as_long_as_was_said():
    asked = []

    def ask():
        asked.append(time.monotonic())
        if len(asked) < 2:
            raise EngineNotReadyError("reloading")
        return "answer"

    assert ask_patiently(ask, 60) == "answer"
    asked.clear()
    with pytest.raises(EngineNotReadyError):
        ask_patiently(lambda: asked.append(0) or ask_in_vain(), 0.5)
    assert len(asked) == 2, "once more, after a second"


def ask_in_vain():
    raise EngineNotReadyError("reloading")


def test_paid_samples_wait_for_seconds_of_the_monotonic_clock(tmp_path):
    store = SampleStore(location(str(tmp_path / "store")))
    batch = PaidBatch(Account(store, "m", str(tmp_path / "run"), "teacher", None))
    batch.add(sample("a"), 1)
    assert store.keys("m") == set()
    batch._written -= 3
    batch.add(sample("b"), 1)
    assert store.keys("m") == {"a", "b"}


def test_a_bar_on_a_terminal_counts_seconds_that_only_grow():
    bars = progress._bars()
    moments = [bars.get_time() for _ in range(4)]
    assert moments == sorted(moments)
    assert moments[-1] == pytest.approx(time.monotonic(), abs=60)
