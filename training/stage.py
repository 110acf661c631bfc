"""The training stage: one Ray Train run over all epochs that are left."""

import os
import tempfile
import uuid
from typing import Any

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import BadInputError, RunError
from cluster.progress import say
from cluster.run_folder import RunFolder

# Ray Train gives up on its workers after a minute; a node that an autoscaler adds takes longer.
_WORKER_START_TIMEOUT_S = "900"


def train(run: RunFolder, config: RunConfig, resampler: Any, board: Any = None) -> None:
    """Train the student until every epoch's checkpoint is published.

    Needs a running Ray and the published pairs of epoch 1; `resampler` is an actor whose
    prepare_epoch(e) publishes those of epoch e, `board` one that shows progress. Goes on after the
    last published checkpoint. Raises RunError where training cannot go on.
    """
    done, epochs = epochs_done(run, config.training.epochs), config.training.epochs
    if done == epochs:
        say(f"training: the checkpoints of all {epochs} epochs are there, nothing to train")
        return
    if done:
        say(f"training: going on after epoch {done} of {epochs}, with its optimizer state")
    _fit(run, config, resampler, board, done)


def epochs_done(run: RunFolder, epochs: int) -> int:
    """The last epoch that training can go on from: all, or one whose trainer state is there."""
    if storage.is_published(run.checkpoint(epochs)):
        return epochs
    for epoch in range(epochs - 1, 0, -1):
        needed = run.checkpoint(epoch), run.trainer_state(epoch)
        if all(storage.is_published(folder) for folder in needed):
            return epoch
    return 0


def _fit(run: RunFolder, config: RunConfig, resampler: Any, board: Any, done: int) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.session import uses_gpu
    from training.worker import Assignment, train_worker

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _WORKER_START_TIMEOUT_S)
    training, on_gpu = config.training, uses_gpu(config)
    say(f"training: starting {training.workers} worker(s)")
    scaling = ray.train.ScalingConfig(
        num_workers=training.workers,
        use_gpu=on_gpu,
        resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if on_gpu else {}),
    )
    with tempfile.TemporaryDirectory(prefix="potstill-train-") as scratch:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"assignment": Assignment(run, config, resampler, board, done)},
            scaling_config=scaling,
            torch_config=TorchConfig(
                backend="nccl" if on_gpu else "gloo",
                timeout_s=int(max(1800, training.resample_timeout_s)),
            ),
            # Ray Train would silently resume a run of the same name.
            run_config=ray.train.RunConfig(
                name=f"potstill-{uuid.uuid4().hex}", storage_path=scratch
            ),
        )
        _run(trainer)


def _run(trainer: Any) -> None:
    from ray.train import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        for failure in failures.values():
            for cause in (failure, failure.__cause__):
                if isinstance(cause, BadInputError | RunError):
                    raise cause from None
        raise RunError(f"training failed: {error}") from error
