"""What each Ray Train worker does: every epoch's steps, its checkpoint, and the wait for pairs."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import RunError
from cluster.metrics import StepLog
from cluster.progress import attach, progress, say
from cluster.publishing import fetch_folder, is_published, publishing
from cluster.run_folder import RunFolder
from cluster.session import result_of
from pipeline.chat import Chat, load_chat
from pipeline.models import resolve_model
from training.batches import global_batches
from training.checkpoints import gather_weights, write_checkpoint
from training.elastic import MissingWorkers
from training.engine import use_threads
from training.examples import Examples, made_ahead
from training.optimizer_state import discard_states, load_state, newest_state, save_state
from training.schedule import count_steps
from training.stepping import Stepper, Wishes, Workers

# How often Ray Train itself looks which nodes are announced to go.
_LOOK_S = 5

Found = TypeVar("Found")


@dataclass(frozen=True)
class Assignment:
    """What the driver hands to every worker."""

    run: RunFolder
    config: RunConfig
    resampler: Any  # actor handle with prepare_epoch(epoch) and sample_ahead(epoch)
    board: Any  # actor handle of cluster.progress.Board, or None
    on_gpu: bool  # what the run decided, for a CPU run may be on a machine with GPUs


def train_worker(settings: dict[str, Assignment]) -> None:
    """Train all that is left. Runs on every worker, also on one that is started anew."""
    import ray.train

    context = ray.train.get_context()
    assignment = settings["assignment"]
    os.environ["DS_ACCELERATOR"] = "cuda" if assignment.on_gpu else "cpu"  # read by its import
    if not assignment.on_gpu or assignment.config.training.offload != "none":
        use_threads(assignment.config.training, context.get_local_world_size())
    attach(assignment.board)
    if assignment.run.epochs_published() < assignment.config.training.epochs:
        Worker(assignment, context.get_world_rank(), context.get_world_size()).train()


class Worker:
    """One worker's way through the epochs: pairs, steps, the trainer's state, checkpoints."""

    def __init__(self, assignment: Assignment, rank: int, workers: int) -> None:
        self.run, self.config = assignment.run, assignment.config
        self.log = StepLog(self.run.metrics_file)
        self.assignment, self.training = assignment, assignment.config.training
        # A group of its own for what the CPU decides; it also has barriers with a time limit.
        limit = timedelta(seconds=self.training.collective_timeout_s)
        self.control = dist.new_group(backend="gloo", timeout=limit)
        self.first, self.rank = rank == 0, rank
        student = self.config.student
        self.base = resolve_model(student.model)
        self.chat: Chat = load_chat(self.base, student.chat_template, student.trust_remote_code)
        self.pairs_per_epoch = len(self._examples(1))
        self.steps = count_steps(
            self.pairs_per_epoch, self.training.global_batch, self.training.steps_per_epoch
        )
        place = Workers(rank, workers, self.control)
        self.stepper = Stepper(self.config, self.base, self.chat, place)
        self.step = self.saved_step = self._resume()
        self.saved_at = self.looked_at = time.monotonic()
        # Worker 0's: the others count none as missing.
        present = workers if self.first else self.training.workers
        self.missing = MissingWorkers(self.config, assignment.on_gpu, present)

    @property
    def _patience(self) -> timedelta:
        return timedelta(seconds=self.training.resample_timeout_s)

    def _resume(self) -> int:
        """Take up the newest whole state of the trainer. Returns its step, 0 for a fresh start."""
        # A student that is gone is made again, on the way that led to it.
        limit = self.steps * (self.run.epochs_published() + 1)
        step = self._from_first(lambda: newest_state(self.run, limit))
        if step:
            source = self.run.trainer_state(step)
            folder = fetch_folder(source, storage.cache_folder())
            load_state(self.stepper.engine, folder)
            dist.barrier(self.control)
            if not storage.is_local(source):  # a copy of no further use, larger than the model
                shutil.rmtree(folder, ignore_errors=True)
        return step

    def _from_first(self, look: Callable[[], Found]) -> Found:
        """What worker 0 sees, on all: storage may show two workers different things."""
        seen: list[Any] = [look() if self.first else None]
        dist.broadcast_object_list(seen, group=self.control)
        return seen[0]

    def train(self) -> None:
        """Train what is left of all epochs, or until the run is to stop or to start again."""
        done, into_epoch = divmod(self.step, self.steps)
        if done and not into_epoch:
            self._publish(done)  # of a try that was ended after it saved its state
        for epoch in range(done + 1, self.training.epochs + 1):
            if self._from_first(self._is_to_leave):
                return
            self._await_pairs(epoch)
            if self.first and self.config.pairs.base == "fresh":
                self.assignment.resampler.sample_ahead.remote(epoch + 1)
            if not self._train_epoch(epoch):
                return
            if epoch < self.training.epochs:
                self._save()
            self._publish(epoch)

    def _await_pairs(self, epoch: int) -> None:
        if self.first and not is_published(self.run.pairs(epoch)):
            self._ask_for_pairs(epoch)
        try:
            # The others may wait since worker 0 began to publish, and its own error says more.
            dist.monitored_barrier(self.control, timeout=2 * self._patience)
        except RuntimeError as error:
            raise RunError(
                f"worker {self.rank} waited for the pairs of epoch {epoch}, at most "
                f"{2 * self._patience}: {error}. Look for the resampler's error in "
                f"{self.run.log_file}, or raise training.resample_timeout_s"
            ) from None

    def _ask_for_pairs(self, epoch: int) -> None:
        import ray

        limit = self.training.resample_timeout_s
        self.missing.withdraw()
        try:
            result_of(self.assignment.resampler.prepare_epoch.remote(epoch), limit)
            self.missing.ask()
        except ray.exceptions.GetTimeoutError:
            raise RunError(
                f"the pairs of epoch {epoch} did not come within {limit:.0f} s: raise "
                "training.resample_timeout_s, or add engines (engines.max_engines)"
            ) from None

    def _examples(self, epoch: int) -> Examples:
        return Examples(self.run, epoch, self.config, self.chat)

    def _train_epoch(self, epoch: int) -> bool:
        """Take the steps that are left of an epoch. Whether it came to its end."""
        examples = self._examples(epoch)
        if len(examples) != self.pairs_per_epoch:
            raise RunError(
                f"epoch {epoch} has {len(examples)} pairs, expected {self.pairs_per_epoch} as in "
                f"epoch 1, on which the learning rate's schedule rests: look at {self.run.pairs(1)}"
            )
        size, steps = self.training.global_batch, self.training.steps_per_epoch
        batches = global_batches(len(examples), size, self.config.run.seed, epoch, steps)
        left = batches[self.step - (epoch - 1) * self.steps :]
        of = self.steps * self.training.epochs
        with self.log, self._shown(epoch, len(batches) - len(left)) as bar:
            for batch in made_ahead(examples.batch, left):
                self.step += 1
                wishes, figures = self.stepper.take(self.step, of, batch, self._wishes())
                if self.first:
                    self.log.add(stage="train", epoch=epoch, **figures)
                if bar:
                    bar.advance(1, **{n: figures[n] for n in ("loss", "margin") if n in figures})
                leave = wishes.look and self._node_goes()
                if wishes.save or leave:
                    self._save()
                if wishes.stop or leave:
                    return False
        return True

    @contextmanager
    def _shown(self, epoch: int, done: int) -> Iterator[Any]:
        """A bar of the epoch on worker 0, whose state is meanwhile saved on request."""
        board = self.assignment.board
        if not self.first or board is None:
            yield None
            return
        board.set_can_save.remote(True)
        try:
            with progress(f"epoch {epoch}/{self.training.epochs}", self.steps) as bar:
                bar.advance(done)
                yield bar
        finally:
            board.set_can_save.remote(False)

    def _wishes(self) -> Wishes | None:
        """Worker 0's, for after the step that comes."""
        if not self.first:
            return None
        stop = self._is_to_leave()
        now = time.monotonic()
        due = now - self.saved_at >= 60 * self.training.save_minutes
        return Wishes(save=stop or due, stop=stop, look=now - self.looked_at >= _LOOK_S)

    def _is_to_leave(self) -> bool:
        return self._asked_to_stop() or self._can_grow()

    def _asked_to_stop(self) -> bool:
        import ray

        board = self.assignment.board
        return board is not None and ray.get(board.asked_to_stop.remote())

    def _can_grow(self) -> bool:
        found = self.missing.find_room()
        if found:
            say(f"training: there is room for {self.training.workers} workers, starting them")
        return found

    def _node_goes(self) -> bool:
        """Whether a worker's node is announced to be taken away. Every worker calls this."""
        import ray.train

        self.looked_at = time.monotonic()
        notice = ray.train.get_preemption_info()
        if notice and self.first:
            ranks = ", ".join(map(str, notice.preempted_ranks))
            say(f"training: the node of worker {ranks} will be taken away, going on without it")
        return notice is not None

    def _save(self) -> None:
        """Publish the trainer's state; only then those before it go."""
        if self.saved_step == self.step:
            return
        self.log.write()
        target = self.run.trainer_state(self.step)
        if self.first:
            self.run.announce_state(self.step)
        with publishing(target) if self.first else nullcontext() as folder:
            save_state(self.stepper.engine, folder, self.step)
        if self.first:
            discard_states(self.run, before=self.step)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _publish(self, epoch: int) -> None:
        """Publish the student, unless an earlier try has, whose negatives may be drawn already."""
        target = self.run.checkpoint(epoch)
        if not self._from_first(partial(is_published, target)):
            weights = gather_weights(self.stepper.engine.model, keep=self.first)
            if self.first:
                trusted = self.config.student.trust_remote_code
                with publishing(target) as folder:
                    write_checkpoint(folder, self.base, weights, self.chat, trusted)
        if self.first and epoch == self.training.epochs:
            discard_states(self.run, before=self.step + 1)
