"""What each Ray Train worker does: every epoch's steps, its checkpoint, and the wait for pairs."""

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import RunError
from cluster.progress import attach, progress
from cluster.run_folder import RunFolder
from cluster.session import result_of
from pipeline.chat import Chat, load_chat
from pipeline.logprobs import shares_prompts
from pipeline.models import resolve_model
from training.batches import MicroBatch, TokenPair, count_batch, global_batches, micro_batches
from training.checkpoints import gather_weights, write_checkpoint
from training.engine import TrainingEngine, load_student, load_teacher, use_threads
from training.examples import Examples
from training.finite import FiniteCheck
from training.objectives import Objective
from training.optimizer_state import load_state, save_state
from training.schedule import count_steps, learning_rate
from training.step import (
    Totals,
    accumulate,
    collate_pairs,
    describe_step,
    log_ratio_to_unrelated,
)


@dataclass(frozen=True)
class Assignment:
    """What the driver hands to every worker."""

    run: RunFolder
    config: RunConfig
    resampler: Any  # actor handle with prepare_epoch(epoch)
    board: Any  # actor handle of cluster.progress.Board, or None
    on_gpu: bool  # what the run decided, for a CPU run may be on a machine with GPUs


def train_worker(settings: dict[str, Assignment]) -> None:
    """Train all epochs that are left. Runs on every worker, also on one that is started anew."""
    import ray.train

    context = ray.train.get_context()
    assignment = settings["assignment"]
    os.environ["DS_ACCELERATOR"] = "cuda" if assignment.on_gpu else "cpu"  # read by its import
    if not assignment.on_gpu:
        use_threads(assignment.config.training, context.get_local_world_size())
    attach(assignment.board)
    epochs = assignment.config.training.epochs
    done = assignment.run.epochs_done(epochs)
    if done < epochs:
        Worker(assignment, done, context.get_world_rank(), context.get_world_size()).train()


class Worker:
    """One worker's model, its place among the workers, and the schedule that all share."""

    def __init__(self, assignment: Assignment, done: int, rank: int, workers: int) -> None:
        self.run, self.config, self.done = assignment.run, assignment.config, done
        self.assignment, self.rank, self.workers = assignment, rank, workers
        self.training = self.config.training
        # A group of its own for what the CPU decides; it also has barriers with a time limit.
        self.control = dist.new_group(backend="gloo", timeout=self._patience)
        self.base = resolve_model(self.config.student.model)
        student = self.config.student
        self.chat: Chat = load_chat(self.base, student.chat_template, student.trust_remote_code)
        self.pairs_per_epoch = len(self._examples(1))
        self.steps = count_steps(
            self.pairs_per_epoch, self.training.global_batch, self.training.steps_per_epoch
        )
        torch.manual_seed(self.config.run.seed)
        model = load_student(self.base, self.config)
        self.engine = TrainingEngine(model, self.training, workers)
        self.finite = FiniteCheck(model.parameters())
        self.teacher = load_teacher(self.config, self.chat, self.engine.deepspeed.device)
        readers = [model, *([self.teacher.model] if self.teacher else [])]
        self.share_prompts = all(shares_prompts(reader.config) for reader in readers)
        self._resume()

    @property
    def _patience(self) -> timedelta:
        return timedelta(seconds=self.training.resample_timeout_s)

    def _resume(self) -> None:
        if self.done:
            state = self.run.trainer_state(self.done)
            saved = storage.fetch_folder(state, storage.cache_folder())
            storage.verify_folder(state, saved)
            step, expected = load_state(self.engine, saved), self.done * self.steps
            assert step == expected, f"state of step {step}, expected {expected}"

    def train(self) -> None:
        """Train every epoch that is left."""
        for epoch in range(self.done + 1, self.training.epochs + 1):
            self._await_pairs(epoch)
            self._train_epoch(epoch)
            self._publish(epoch)

    def _await_pairs(self, epoch: int) -> None:
        if self.rank == 0 and not storage.is_published(self.run.pairs(epoch)):
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
        try:
            result_of(self.assignment.resampler.prepare_epoch.remote(epoch), limit)
        except ray.exceptions.GetTimeoutError:
            raise RunError(
                f"the pairs of epoch {epoch} did not come within {limit:.0f} s: raise "
                "training.resample_timeout_s, or add engines (engines.max_engines)"
            ) from None

    def _examples(self, epoch: int) -> Examples:
        return Examples(self.run, epoch, self.config, self.chat)

    def _train_epoch(self, epoch: int) -> None:
        examples = self._examples(epoch)
        if len(examples) != self.pairs_per_epoch:
            raise RunError(
                f"epoch {epoch} has {len(examples)} pairs, expected {self.pairs_per_epoch} as in "
                f"epoch 1, on which the learning rate's schedule rests: look at {self.run.pairs(1)}"
            )
        # Dropout then repeats in a run that was interrupted.
        torch.manual_seed(Random(f"{self.config.run.seed}/{epoch}/{self.rank}").getrandbits(63))
        size, steps = self.training.global_batch, self.training.steps_per_epoch
        batches = global_batches(len(examples), size, self.config.run.seed, epoch, steps)
        title = f"epoch {epoch}/{self.training.epochs}"
        shown = self.rank == 0 and self.assignment.board is not None
        with progress(title, self.steps) if shown else nullcontext() as bar:
            for number, indices in enumerate(batches, 1):
                figures = self._step(epoch, number, [examples[index] for index in indices])
                if self.rank == 0:
                    self.run.record(stage="train", epoch=epoch, **figures)
                if bar:
                    bar.advance(1, **{n: figures[n] for n in ("loss", "margin") if n in figures})

    def _step(self, epoch: int, number: int, batch: list[TokenPair]) -> dict[str, float]:
        started, training = time.monotonic(), self.training
        step = (epoch - 1) * self.steps + number
        objective = self._objective(batch)
        totals = self._forward_backward(batch, objective)
        self._stop_if_not_finite(step)
        totals.reduce(self.control)
        total = self.steps * training.epochs
        rate = learning_rate(step, total, training.learning_rate, training.warmup_share)
        norm = self.engine.step(rate)
        figures = describe_step(totals, objective)
        speed = figures.pop("tokens") / (time.monotonic() - started)
        return (
            {"step": step, "steps": total}
            | figures
            | {
                "grad_norm": norm,
                "learning_rate": rate,
                "tokens_per_second": speed,
            }
        )

    def _objective(self, batch: list[TokenPair]) -> Objective:
        counts = count_batch(batch, self.training.nll_scope == "full")
        if self.training.method != "kto":
            return Objective(self.training, counts, teacher=self.teacher)
        share = self._share(batch)
        divergence = log_ratio_to_unrelated(self.engine.scorer, share, self.chat.pad_id)
        dist.all_reduce(divergence, group=self.control)
        return Objective(self.training, counts, divergence / counts.pairs, self.teacher)

    def _share(self, batch: list[TokenPair]) -> list[MicroBatch]:
        return micro_batches(batch, self.training.micro_batch, self.workers, self.rank)

    def _forward_backward(self, batch: list[TokenPair], objective: Objective) -> Totals:
        collator = partial(
            collate_pairs,
            pad_id=self.chat.pad_id,
            share_prompts=self.share_prompts,
            score_prompt=self.training.nll_scope == "full",
        )

        def backward(loss: torch.Tensor, micro: MicroBatch) -> None:
            self.engine.backward(loss)
            self.finite.add(loss, micro)

        share = self._share(batch)
        return accumulate(self.engine.scorer, share, objective, collator, backward)

    def _stop_if_not_finite(self, step: int) -> None:
        gathered: list[Any] = [None] * self.workers
        dist.all_gather_object(gathered, self.finite.offenders(), group=self.control)
        prompt_ids = [prompt_id for found in gathered for prompt_id in found]
        if prompt_ids:
            raise RunError(
                f"step {step}: the loss or a gradient is not finite, so the step was not taken. "
                f"The pairs are among those of prompts {', '.join(prompt_ids)}: look at them in "
                f"{self.run.root / 'pairs'}, lower training.learning_rate, or set "
                "training.odds_gradient_cap"
            )

    def _publish(self, epoch: int) -> None:
        """Publish state, then checkpoint: an epoch is done once both are there."""
        first = self.rank == 0
        last = epoch == self.training.epochs
        if not last:
            target = self.run.trainer_state(epoch)
            staging = storage.staging_folder(target) if first else Path()
            save_state(self.engine, staging, epoch * self.steps, write=first)
            if first:
                storage.publish_folder(staging, target)
        weights = gather_weights(self.engine.model, keep=first)
        if first:
            target = self.run.checkpoint(epoch)
            staging = storage.staging_folder(target)
            trusted = self.config.student.trust_remote_code
            write_checkpoint(staging, self.base, weights, self.chat, trusted)
            storage.publish_folder(staging, target)
            for earlier in range(1, epoch + last):
                storage.discard_folder(self.run.trainer_state(earlier))
