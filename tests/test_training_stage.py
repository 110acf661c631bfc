"""The training stage without Ray: where it goes on from, and how it ends."""

import os
import signal
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster import storage
from cluster.config import parse_config
from cluster.errors import RunError
from cluster.run_folder import RunFolder
from training import worker
from training.stage import _failure_config, _interruptible, _run


@pytest.fixture
def run(tmp_path):
    return RunFolder(storage.location(str(tmp_path)))


def publish(*targets):
    for target in targets:
        staging = storage.staging_folder(target)
        (staging / "file").write_text("x")
        storage.publish_folder(staging, target)


def test_training_goes_on_from_an_epoch_with_checkpoint_and_state(run):
    assert run.epochs_done(3) == 0
    publish(run.checkpoint(1), run.trainer_state(1), run.checkpoint(2))
    assert run.epochs_done(3) == 1
    publish(run.trainer_state(2))
    assert run.epochs_done(3) == 2
    publish(run.checkpoint(3))
    assert run.epochs_done(3) == 3


@pytest.fixture
def start_worker(run, monkeypatch):
    """Starts Ray Train's function as each try of it does; gives what its worker was told."""
    told = []

    class FakeWorker:
        def __init__(self, assignment, done, rank, workers):
            told.append((done, os.environ["DS_ACCELERATOR"]))

        def train(self):
            pass

    places = {"get_world_rank": 0, "get_world_size": 1, "get_local_world_size": 1}
    context = SimpleNamespace(**{name: lambda n=number: n for name, number in places.items()})
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    monkeypatch.setattr(worker, "use_threads", lambda *_: None)
    monkeypatch.setenv("DS_ACCELERATOR", "what the driver's machine has")
    raw = {
        "run": {"folder": str(run.root)},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
        "training": {"epochs": 2},
    }
    config = parse_config(raw, "test")

    def start(on_gpu=False):
        told.clear()
        assignment = worker.Assignment(run, config, None, None, on_gpu)
        worker.train_worker({"assignment": assignment})
        return told

    return start


def test_a_worker_that_is_started_anew_goes_on_from_what_is_published_then(run, start_worker):
    assert start_worker() == [(0, "cpu")]
    publish(run.checkpoint(1), run.trainer_state(1))
    assert start_worker() == [(1, "cpu")]
    publish(run.checkpoint(2))
    assert start_worker() == [], "nothing is left"


def test_deepspeed_runs_on_what_the_run_decided(start_worker):
    assert start_worker(on_gpu=True) == [(0, "cuda")]
    assert start_worker(on_gpu=False) == [(0, "cpu")]


STARTUP = ControllerError(WorkerGroupStartupTimeoutError(2))


@pytest.mark.parametrize("error", [STARTUP, WorkerGroupError("", {0: ValueError("x")})])
def test_ray_train_does_not_try_for_ever(error):
    assert DefaultFailurePolicy(_failure_config()).make_decision(error) == FailureDecision.RAISE
    assert (
        DefaultFailurePolicy(FailureConfig(max_failures=-1)).make_decision(error)
        == FailureDecision.RETRY
    )


def trainer(fit):
    asked = {"num_workers": 2, "resources_per_worker": {"CPU": 9}}
    scaling = SimpleNamespace(**asked, label_selector={"stage": "training"})
    return SimpleNamespace(fit=fit, scaling_config=scaling)


def raises(error):
    def fit():
        raise error

    return fit


def test_training_without_room_says_what_was_asked_and_what_there_is(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 7.0})
    asked = r"2 x \{'CPU': 9\} on nodes with labels \{'stage': 'training'\} .*; "
    there = r"the cluster has \{'CPU': 8.0\}, of which \{'CPU': 7.0\} are free"
    with pytest.raises(RunError, match=rf"{asked}{there}: add nodes, or lower training\.workers"):
        _run(trainer(raises(STARTUP)))


def test_worker_0_is_believed_first():
    failures = {1: RunError("waited"), 0: RunError("the reason")}
    with pytest.raises(RunError, match="the reason"):
        _run(trainer(raises(WorkerGroupError("", failures))))


def test_ray_s_pages_become_one_line_for_the_user_and_the_log_has_them(capsys):
    told = "a worker failed\n  File x, line 3\nValueError: shapes differ"
    with pytest.raises(RunError) as stopped:
        _run(trainer(raises(WorkerGroupError(told, {0: ValueError("shapes differ")}))))
    assert "\n" not in str(stopped.value)
    assert str(stopped.value).endswith("shapes differ")
    assert "File x, line 3" in capsys.readouterr().err


def test_a_worker_that_ray_ended_for_its_memory_gets_advice():
    killed = RayActorError(error_msg="1 Workers (tasks / actors) killed due to memory pressure")
    with pytest.raises(RunError, match=r"ran out of memory.*training\.micro_batch"):
        _run(trainer(raises(WorkerGroupError("died", {0: killed}))))


def test_ctrl_c_in_training_is_an_interruption_and_so_it_is_after_it():
    def fit():
        signal.signal(signal.SIGINT, lambda *_: raises(SystemExit(0))())  # as Ray Train does
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _interruptible():
        _run(trainer(fit))
    assert signal.getsignal(signal.SIGINT) is before
