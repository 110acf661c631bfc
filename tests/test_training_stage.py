"""The training stage without Ray: where it goes on from, and how it ends."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, PreemptionError, PreemptionInfo
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster import storage
from cluster.config import parse_config
from cluster.errors import RunError, WorkersLostError
from cluster.publishing import publish_folder, staging_folder
from cluster.run_folder import RunFolder
from training import stage, worker
from training.optimizer_state import newest_state
from training.stage import _failure_config, _interruptible, _run


@pytest.fixture
def run(tmp_path):
    return RunFolder(storage.location(str(tmp_path)))


def publish(*targets):
    for target in targets:
        staging = staging_folder(target)
        (staging / "file").write_text("x")
        publish_folder(staging, target)


@pytest.mark.fault
def test_training_goes_on_from_the_newest_whole_state(run, capsys):
    assert newest_state(run, 1000) == 0
    publish(run.trainer_state(3), run.trainer_state(120))
    (run.trainer_state(500) / "file").parent.mkdir(parents=True)  # half written
    assert newest_state(run, 1000) == 120
    (run.trainer_state(120) / "file").write_text("y")
    assert newest_state(run, 1000) == 3
    assert newest_state(run, 2) == 0, "the student of an epoch before is gone"
    assert "step_000120 is damaged: set aside" in capsys.readouterr().out
    assert len(list(run.root.glob("trainer_state/step_000120.damaged-*"))) == 1


@pytest.mark.fault
def test_states_go_only_once_a_later_one_is_there_and_proved(run, monkeypatch):
    publish(*map(run.trainer_state, (3, 6)))
    trainer = object.__new__(worker.Worker)  # one that has taken nine steps, without an engine
    trainer.run, trainer.log = run, SimpleNamespace(write=lambda: None)
    trainer.first, trainer.step, trainer.saved_step = True, 9, 6
    trainer.stepper = SimpleNamespace(engine=None)
    monkeypatch.setattr(
        worker, "save_state", lambda engine, folder, step: (folder / "file").write_text("x")
    )
    with monkeypatch.context() as disk:  # which gives back other bytes than it was given
        disk.setattr("shutil.move", lambda source, target: Path(target).write_text("y"))
        with pytest.raises(RunError, match="does not give back what was written"):
            trainer._save()
    assert run.saved_steps() == [3, 6]
    trainer._save()
    assert run.saved_steps() == [9]


@pytest.fixture
def start_worker(run, monkeypatch):
    """Starts Ray Train's function as each try of it does; gives what its worker was told."""
    told = []

    class FakeWorker:
        def __init__(self, assignment, rank, workers):
            told.append(os.environ["DS_ACCELERATOR"])

        def train(self):
            pass

    places = {"get_world_rank": 0, "get_world_size": 1, "get_local_world_size": 1}
    context = SimpleNamespace(**{name: lambda n=number: n for name, number in places.items()})
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    monkeypatch.setattr(worker, "use_threads", lambda *_: None)
    monkeypatch.setenv("DS_ACCELERATOR", "what the driver's machine has")
    config = configured(run, epochs=2)

    def start(on_gpu=False):
        told.clear()
        assignment = worker.Assignment(run, config, None, None, on_gpu)
        worker.train_worker({"assignment": assignment})
        return told

    return start


@pytest.mark.fault
def test_a_worker_that_is_started_anew_has_nothing_to_do_once_all_is_published(run, start_worker):
    publish(run.checkpoint(1))
    assert start_worker() == ["cpu"]
    publish(run.checkpoint(2))
    assert start_worker() == []


def test_deepspeed_runs_on_what_the_run_decided(start_worker):
    assert start_worker(on_gpu=True) == ["cuda"]
    assert start_worker(on_gpu=False) == ["cpu"]


STARTUP = ControllerError(WorkerGroupStartupTimeoutError(2))
NODE_GONE = PreemptionError(PreemptionInfo(None, {"node": [1]}), drain_timed_out=True)


@pytest.mark.parametrize("error", [STARTUP, WorkerGroupError("", {0: ValueError("x")}), NODE_GONE])
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


def configured(run, **training):
    raw = {
        "run": {"folder": str(run.root)},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
        "training": training,
    }
    return parse_config(raw, "test")


@pytest.mark.fault
def test_training_goes_on_where_workers_were_lost_and_not_where_it_failed(run, monkeypatch, capsys):
    config = configured(run, restarts=2)
    died = RayActorError(error_msg="the node died")
    gone, tries = WorkerHealthCheckFailedError("no answer", died), []

    def fit(failure):
        tries.append(failure)
        _run(trainer(raises(WorkerGroupError("died", {0: RuntimeError("peer"), 1: failure}))))

    for failure, expected in ((gone, 3), (ValueError("shapes differ"), 1)):
        tries.clear()
        monkeypatch.setattr(stage, "_fit", lambda *_, failure=failure: fit(failure))
        with pytest.raises(RunError):
            stage.train(run, config, None)
        assert len(tries) == expected
    assert capsys.readouterr().out.count("training lost worker 1 of 2: going on") == 2


@pytest.mark.parametrize(
    "told",
    [
        "[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1",
        "[/x/gloo/transport/tcp/pair.cc:554] Read error [10.0.0.2]:1: Connection reset by peer",
        "NCCL error in: NCCLUtils.cpp:93, remote process exited\nncclRemoteError: A call failed",
    ],
)
def test_a_peer_that_misses_another_tells_of_its_loss_before_ray_does(told):
    with pytest.raises(WorkersLostError, match="training lost a worker of 2"):
        _run(trainer(raises(WorkerGroupError("", {0: RuntimeError(told)}))))


def test_a_bucket_that_breaks_a_connection_is_no_lost_worker():
    with pytest.raises(RunError) as stopped:
        _run(trainer(raises(WorkerGroupError("", {0: OSError("Connection reset by peer")}))))
    assert not isinstance(stopped.value, WorkersLostError)


def test_an_announced_loss_of_a_node_that_came_too_soon_is_a_loss_of_workers():
    with pytest.raises(WorkersLostError, match=r"lost a node, as was announced"):
        _run(trainer(raises(NODE_GONE)))


def test_training_starts_again_where_its_workers_left_before_the_end(run, monkeypatch):
    """Others have found room, or a node is to be taken away: the state is saved then."""
    tries = []

    def fit(run, *_):
        tries.append(run.epochs_published())
        if len(tries) > 1:
            publish(run.checkpoint(len(tries) - 1))

    monkeypatch.setattr(stage, "_fit", fit)
    stage.train(run, configured(run, epochs=2, restarts=0), None)
    assert tries == [0, 0, 1]


@pytest.mark.fault
def test_a_worker_that_is_lost_after_sigterm_does_not_start_training_again(monkeypatch):
    board = SimpleNamespace(ask_to_stop=SimpleNamespace(remote=lambda: True))
    monkeypatch.setattr("ray.get", lambda value: value)

    def lose_a_worker(after_sigterm):
        with stage._stoppable(board):
            if after_sigterm:
                os.kill(os.getpid(), signal.SIGTERM)
            raise WorkersLostError("training lost worker 0")

    with pytest.raises(KeyboardInterrupt):
        lose_a_worker(after_sigterm=True)
    with pytest.raises(WorkersLostError):
        lose_a_worker(after_sigterm=False)


def test_ctrl_c_in_training_is_an_interruption_and_so_it_is_after_it():
    def fit():
        signal.signal(signal.SIGINT, lambda *_: raises(SystemExit(0))())  # as Ray Train does
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _interruptible():
        _run(trainer(fit))
    assert signal.getsignal(signal.SIGINT) is before
