"""Figures of steps: at once on a disk, gathered for a bucket, never behind what is published."""

import json
from contextlib import suppress
from types import SimpleNamespace

import pytest

from cluster import metrics
from cluster.metrics import StepLog, read_records
from cluster.publishing import is_published
from cluster.run_folder import RunFolder
from cluster.storage import location
from training import worker
from training.worker import Worker

pytestmark = pytest.mark.fault


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def in_a_bucket(tmp_path):
    return location(f"memory://{tmp_path.name}/metrics.jsonl")


def steps(file):
    return [record["step"] for record in read_records(file)]


def test_on_a_disk_each_step_is_there_at_once(clock, tmp_path):
    log = StepLog(location(str(tmp_path / "metrics.jsonl")))
    for step in (1, 2, 3):
        log.add(step=step)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))


def test_in_a_bucket_steps_are_written_together_every_few_seconds(clock, in_a_bucket):
    log = StepLog(in_a_bucket)
    log.add(step=1)
    for step in range(2, 8):
        clock[0] += 0.9
        log.add(step=step)
        assert steps(in_a_bucket) == ([1] if step < 7 else list(range(1, 8)))


def test_a_slow_step_waits_for_no_other(clock, in_a_bucket):
    log = StepLog(in_a_bucket)
    for step in (1, 2):
        clock[0] += 60
        log.add(step=step)
    assert steps(in_a_bucket) == [1, 2]


def test_at_the_end_of_the_block_all_is_written_once(clock, in_a_bucket):
    log = StepLog(in_a_bucket)
    with suppress(RuntimeError), log:
        log.add(step=1)
        log.add(step=2)
        raise RuntimeError
    assert steps(in_a_bucket) == [1, 2]
    log.write()
    assert steps(in_a_bucket) == [1, 2]


def test_what_others_have_written_meanwhile_stays(clock, in_a_bucket):
    run, log = RunFolder(in_a_bucket.parent), StepLog(in_a_bucket)
    log.add(step=1)
    log.add(step=3)
    run.record(step=2)
    log.write()
    assert steps(in_a_bucket) == [1, 2, 3]


def test_a_trainers_state_is_never_ahead_of_the_figures(clock, in_a_bucket, monkeypatch):
    trainer = object.__new__(Worker)  # one that has taken two steps, without an engine
    trainer.run, trainer.log = RunFolder(in_a_bucket.parent), StepLog(in_a_bucket)
    trainer.first, trainer.step, trainer.saved_step = True, 2, 0
    trainer.stepper = SimpleNamespace(engine=None)
    written = []

    def save_state(engine, folder, step):
        written.append(steps(in_a_bucket))
        (folder / "moments").write_text("x")

    monkeypatch.setattr(worker, "save_state", save_state)
    for step in (1, 2):
        trainer.log.add(step=step)
    trainer._save()
    assert written == [[1, 2]]
    assert is_published(trainer.run.trainer_state(2))
    assert trainer.run.saved_steps() == [2]
