"""Two processes never work in one run folder, and a lock ends with the one that held it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cluster import lock
from cluster.errors import BadInputError
from cluster.lock import locked, refuse_held
from cluster.storage import location

pytestmark = pytest.mark.fault

HOLD = """
import sys, time
from cluster.lock import locked
from cluster.storage import location
with locked(location(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """Starts another process that holds the lock of a folder."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def take(folder):
    with locked(location(str(folder))):
        pass


def test_a_second_process_is_refused_in_the_same_folder_only(tmp_path, holder):
    holder(tmp_path / "run")
    with pytest.raises(BadInputError, match=r"another process works in .*run: .*set run\.folder"):
        take(tmp_path / "run")
    with pytest.raises(BadInputError, match="another process works in"):
        refuse_held(location(str(tmp_path / "run")))
    take(tmp_path / "other")


@pytest.mark.parametrize("stopped_by", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_does_not_outlive_a_killed_process(tmp_path, holder, stopped_by):
    process = holder(tmp_path / "run")
    process.send_signal(stopped_by)
    process.wait()
    take(tmp_path / "run")


def test_a_lock_of_long_ago_and_one_of_the_future_bind_no_one(tmp_path):
    take(tmp_path)
    for moment in (0, time.time() + 1e6):
        os.utime(tmp_path / ".lock", (moment, moment))
        take(tmp_path)


def test_looking_for_a_lock_leaves_nothing_behind(tmp_path):
    refuse_held(location(str(tmp_path / "run")))
    assert not any(tmp_path.iterdir())


@pytest.fixture
def remote_run(bucket):
    return location(f"{bucket}/run")


@pytest.fixture
def quick_beats(monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_S", 0.2)


def test_in_a_bucket_a_second_process_is_refused_while_the_first_lives(remote_run, quick_beats):
    with (
        locked(remote_run),
        pytest.raises(BadInputError, match=rf"process {os.getpid()} on .* works"),
    ):
        take(remote_run)
    assert not (remote_run / ".lock").exists()
    take(remote_run)


@pytest.mark.parametrize("left", [{"id": "gone", "beats": 7}, "half a lin"])
def test_in_a_bucket_a_holder_that_stands_still_is_dead(remote_run, quick_beats, left):
    (remote_run / ".lock").write_text(left if isinstance(left, str) else json.dumps(left))
    take(remote_run)


def test_in_a_bucket_one_of_two_that_start_at_once_is_refused(remote_run, quick_beats, monkeypatch):
    met = threading.Barrier(2)
    monkeypatch.setattr(lock._Beating, "_await_silence", lambda self: met.wait())
    results = []

    def start():
        try:
            with locked(remote_run):
                time.sleep(1)
            results.append("held")
        except BadInputError:
            results.append("refused")

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held", "refused"]


def test_in_a_bucket_a_request_that_is_sent_again_does_not_refuse_its_own_run(
    remote_run, quick_beats, monkeypatch
):
    write = lock._Beating._write

    def write_twice(beating, mode):
        write(beating, mode)
        if mode == "create":  # its answer was lost
            write(beating, mode)

    monkeypatch.setattr(lock._Beating, "_write", write_twice)
    take(remote_run)
    assert not (remote_run / ".lock").exists()


def test_in_a_bucket_one_whose_lock_was_taken_stops(remote_run, holder):
    process = holder(remote_run)
    (remote_run / ".lock").write_text(json.dumps({"id": "another", "beats": 0}))
    assert process.wait(timeout=60) == 75
    assert (remote_run / ".lock").exists(), "the lock of the other one"
