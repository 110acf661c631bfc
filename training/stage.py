"""The training stage: one Ray Train run over all epochs that are left."""

import os
import re
import signal
import tempfile
import threading
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.config import RunConfig
from cluster.errors import RunError, WorkersLostError
from cluster.placement import label_selector
from cluster.progress import say
from cluster.run_folder import RunFolder
from cluster.session import own_error

# Ray Train gives up on its workers after a minute; a node that an autoscaler adds takes longer.
_WORKER_START_TIMEOUT_S = "900"
# What gloo and NCCL say of a peer that is gone, as they do before Ray has missed its node.
_PEER_GONE = re.compile("gloo/transport.*(closed|reset) by peer|ncclRemoteError")
_OUT_OF_MEMORY = re.compile("memory pressure|low on memory|OutOfMemory|out of memory")


def train(run: RunFolder, config: RunConfig, resampler: Any, board: Any = None) -> None:
    """Train the student until every epoch's checkpoint is published.

    Needs a running Ray and the published pairs of epoch 1; `resampler` is an actor whose
    prepare_epoch(e) publishes those of epoch e, `board` one that shows progress. Goes on after the
    last published checkpoint. Raises RunError where training cannot go on.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

    epochs = config.training.epochs
    if run.epochs_published() >= epochs:
        say(f"training: the checkpoints of all {epochs} epochs are there, nothing to train")
        return
    tries = Retrying(
        retry=retry_if_exception_type(WorkersLostError),
        stop=stop_after_attempt(1 + config.training.restarts),
        before_sleep=lambda state: say(f"{state.outcome and state.outcome.exception()}: going on"),
        reraise=True,
    )
    while run.epochs_published() < epochs:  # workers leave where others had better join them
        tries(_fit, run, config, resampler, board)


def _fit(run: RunFolder, config: RunConfig, resampler: Any, board: Any) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.session import uses_gpu
    from training.elastic import workers_with_room
    from training.worker import Assignment, train_worker

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _WORKER_START_TIMEOUT_S)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths mean the same in every process
    training, on_gpu = config.training, uses_gpu(config)
    if steps := run.saved_steps():
        say(f"training: going on after step {steps[-1]}, with the optimizer's state")
    workers = workers_with_room(config, on_gpu)
    wanted = f" of {training.workers}" if workers < training.workers else ""
    say(f"training: starting {workers}{wanted} worker(s)")
    with tempfile.TemporaryDirectory(prefix="potstill-train-") as scratch:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"assignment": Assignment(run, config, resampler, board, on_gpu)},
            scaling_config=_scaling(config, on_gpu, workers),
            torch_config=TorchConfig(
                backend="nccl" if on_gpu else "gloo",
                timeout_s=training.collective_timeout_s,
            ),
            run_config=ray.train.RunConfig(
                name=f"potstill-{uuid.uuid4().hex}",  # it would silently resume one of its name
                storage_path=scratch,
                failure_config=_failure_config(),
            ),
        )
        with _stoppable(board), _interruptible():
            _run(trainer)


def _scaling(config: RunConfig, on_gpu: bool, workers: int) -> Any:
    from ray.train import ScalingConfig

    from training.elastic import worker_resources

    return ScalingConfig(  # type: ignore[call-arg]  # declared as that of version 1
        num_workers=workers,
        use_gpu=on_gpu,
        resources_per_worker=worker_resources(config, on_gpu),
        label_selector=label_selector(config.cluster.training_nodes) or None,
    )


def _failure_config() -> Any:
    """Leave it to train() to start again, which looks how many workers find room by then.

    Ray Train's own default asks for the same workers again and again, for ever.
    """
    from ray.train import FailureConfig

    return FailureConfig(  # type: ignore[call-arg]  # declared as that of version 1
        max_failures=0, controller_failure_limit=0, max_preemption_failures=0
    )


@contextmanager
def _stoppable(board: Any) -> Iterator[None]:
    """Let a first SIGTERM within the block save the trainer's state before it ends the run."""
    import ray

    if board is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def ask() -> None:
        # In the midst of pairs or of the start there is nothing that is not saved.
        if not ray.get(board.ask_to_stop.remote()):
            os.kill(os.getpid(), signal.SIGTERM)  # the second one, which stop() does not wait for

    def stop(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("asked to stop: saving the trainer's state first")
        threading.Thread(target=ask, daemon=True).start()

    handler = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except WorkersLostError:
        if not asked:  # else those that start anew would hear of the stop, and end at once
            raise
    finally:
        signal.signal(signal.SIGTERM, handler)
    if asked:
        raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train answers Ctrl-C by leaving with code 0, and would still do so after training."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _run(trainer: Any) -> None:
    from ray.train import ControllerError, PreemptionError, TrainingFailedError

    try:
        trainer.fit()
    except ControllerError as error:
        raise RunError(_diagnosis(trainer.scaling_config, error)) from error
    except PreemptionError as error:
        raise WorkersLostError(f"training lost a node, as was announced: {error}") from error
    except TrainingFailedError as error:
        traceback.print_exception(error)  # its pages go to the log
        failures = dict(sorted(getattr(error, "worker_failures", {}).items()))
        told = "\n".join(map(str, [error, *failures.values()]))
        lost = _lost(failures)
        if (lost or _PEER_GONE.search(told)) and not _OUT_OF_MEMORY.search(told):
            who = f"worker {', '.join(map(str, lost))}" if lost else "a worker"
            raise WorkersLostError(
                f"training lost {who} of {trainer.scaling_config.num_workers}"
            ) from error
        # Worker 0 knows most, and comes first.
        ours = next(filter(None, map(own_error, failures.values())), None)
        raise ours or RunError(_in_short(told)) from error


def _lost(failures: Mapping[int, Exception]) -> list[int]:
    """Workers whose process or node is gone; the others' errors come of that."""
    import ray

    causes = {
        rank: getattr(failure, "health_check_failure", failure)
        for rank, failure in failures.items()
    }
    gone = ray.exceptions.RayActorError
    return [rank for rank, cause in causes.items() if isinstance(cause, gone)]


def _in_short(told: str) -> str:
    """One line on what Ray tells in pages."""
    if _OUT_OF_MEMORY.search(told):
        return (
            "training failed: a node ran out of memory, and a worker on it was ended. Run again "
            "with a lower training.micro_batch, with training.gradient_checkpointing=true, or with "
            "engines.between_epochs=release, which goes on after the last epoch"
        )
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return f"training failed: {' ... '.join(dict.fromkeys([lines[0], lines[-1]]))}"


def _diagnosis(scaling: Any, error: Any) -> str:
    import ray

    labels = scaling.label_selector
    where = f" on nodes with labels {labels} (cluster.training_nodes)" if labels else ""
    return (
        f"Ray Train has no workers: {error.controller_failure} Asked for {scaling.num_workers} x "
        f"{scaling.resources_per_worker}{where}; the cluster has {ray.cluster_resources()}, of "
        f"which {ray.available_resources()} are free: add nodes, or lower training.workers, "
        "training.min_workers, training.cpus_per_worker or engines.max_engines"
    )
