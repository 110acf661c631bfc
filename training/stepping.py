"""One worker's part in each optimizer step: its share of the batch, and what all agree upon."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from cluster.config import RunConfig
from cluster.errors import RunError
from pipeline.chat import Chat
from pipeline.logprobs import shares_prompts
from training.batches import MicroBatch, TokenPair, count_batch, micro_batches
from training.engine import TrainingEngine, load_student, load_teacher
from training.finite import FiniteCheck, NotFiniteError
from training.objectives import Objective
from training.schedule import learning_rate
from training.step import (
    Totals,
    accumulate,
    collate_pairs,
    describe_step,
    log_ratio_to_unrelated,
)


@dataclass(frozen=True)
class Workers:
    """This worker's place among all, and the group in which CPUs decide together."""

    rank: int
    count: int
    control: dist.ProcessGroup


@dataclass(frozen=True)
class Wishes:
    """What worker 0 wants done after a step."""

    save: bool
    stop: bool
    look: bool  # whether a node is to be taken away, which all workers ask together


class Stepper:
    """The student inside DeepSpeed, and all that a step needs beside it."""

    def __init__(self, config: RunConfig, base: Path, chat: Chat, workers: Workers) -> None:
        self._seed, self._training = config.run.seed, config.training
        self._pad_id, self._workers = chat.pad_id, workers
        torch.manual_seed(config.run.seed)
        model = load_student(base, config, workers.count)
        self.engine = TrainingEngine(model, config.training, workers.count)
        self._finite = FiniteCheck(model.parameters())
        self._teacher = load_teacher(config, chat, self.engine.deepspeed.device)
        readers = [model, *([self._teacher.model] if self._teacher else [])]
        self._share_prompts = all(shares_prompts(reader.config) for reader in readers)

    def take(
        self, step: int, of: int, batch: list[TokenPair], wishes: Wishes | None
    ) -> tuple[Wishes, dict[str, float]]:
        """Learn from a global batch. Returns worker 0's wishes, and the step's figures.

        Raises RunError, on all workers and before the step is taken, where the loss or a gradient
        of any of them is not finite.
        """
        started, training = time.monotonic(), self._training
        # By step, so that dropout repeats in a run that was interrupted.
        torch.manual_seed(Random(f"{self._seed}/{step}/{self._workers.rank}").getrandbits(63))
        objective = self._objective(batch)
        totals = self._forward_backward(batch, objective)
        wishes = self._agree(step, wishes)
        totals.reduce(self._workers.control)
        shares = training.warmup_share, training.final_rate_share
        rate = learning_rate(step, of, training.learning_rate, *shares)
        try:
            norm = self.engine.step(rate)
        except NotFiniteError as error:  # of the sum alone: no worker knows whose it is
            raise _refusal(step, error, (pair.prompt_id for pair in batch)) from None
        figures = describe_step(totals, objective)
        speed = figures.pop("tokens") / (time.monotonic() - started)
        more = {"grad_norm": norm, "learning_rate": rate, "tokens_per_second": speed}
        return wishes, {"step": step, "steps": of} | figures | more

    def _objective(self, batch: list[TokenPair]) -> Objective:
        counts = count_batch(batch, self._training.nll_scope == "full")
        if self._training.method != "kto":
            return Objective(self._training, counts, teacher=self._teacher)
        divergence = log_ratio_to_unrelated(self.engine.scorer, self._share(batch), self._pad_id)
        dist.all_reduce(divergence, group=self._workers.control)
        return Objective(self._training, counts, divergence / counts.pairs, self._teacher)

    def _share(self, batch: list[TokenPair]) -> list[MicroBatch]:
        workers = self._workers
        return micro_batches(batch, self._training.micro_batch, workers.count, workers.rank)

    def _forward_backward(self, batch: list[TokenPair], objective: Objective) -> Totals:
        collator = partial(
            collate_pairs,
            pad_id=self._pad_id,
            share_prompts=self._share_prompts,
            score_prompt=self._training.nll_scope == "full",
            with_teacher=self._teacher is not None,
        )

        def backward(loss: torch.Tensor, micro: MicroBatch) -> None:
            self.engine.backward(loss)
            self._finite.add(loss, micro)

        share = self._share(batch)
        return accumulate(self.engine.scorer, share, objective, collator, backward)

    def _agree(self, step: int, wishes: Wishes | None) -> Wishes:
        gathered: list[Any] = [None] * self._workers.count
        mine = (self._finite.offenders(), wishes)
        dist.all_gather_object(gathered, mine, group=self._workers.control)
        prompt_ids = [prompt_id for offenders, _ in gathered for prompt_id in offenders]
        if prompt_ids:
            raise _refusal(step, "the loss or a gradient is not finite", prompt_ids)
        return gathered[0][1]


def _refusal(step: int, what: object, prompt_ids: Iterable[str]) -> RunError:
    return RunError(
        f"step {step}: {what}, so the step was not taken. The pairs are among those of prompts "
        f"{', '.join(dict.fromkeys(prompt_ids))}: look at them in the run's pairs/, lower "
        "training.learning_rate, or set training.odds_gradient_cap"
    )
