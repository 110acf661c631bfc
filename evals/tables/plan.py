"""What a table would cost, from sizes alone: neither weights nor data need be at hand.

Speeds are those of cluster.memory: GPUs' are assumed, not yet measured, cores' are those that a
model of 135 M parameters reaches; smaller ones reach less.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from rich.table import Table

from cluster import memory
from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.sections import Model
from evals.tables.spec import Cell, TableSpec
from pipeline.pairs import draws_from_latest
from pipeline.tasks import TASKS

# A trace is seldom as long as it may be: the estimate spans these shares of max_new_tokens.
_SHORT, _LONG = 0.25, 1.0
_ASSUMED_RIGHT = 0.5  # share of a teacher's traces
_PROMPT_TOKENS = 200
_HOUR = 3600.0
# Core seconds in which a stage's workers and engines start: most of a tiny model's stage.
_CPU_START = 75.0
# Operations a second in decoding and in training.
_GPU = memory.GPU_DECODING, memory.GPU_TRAINING
_CORE = memory.CPU_CORE_DECODING, memory.CPU_CORE_TRAINING


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and stages that start."""

    decoding: float = 0.0
    training: float = 0.0
    starts: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.decoding + other.decoding,
            self.training + other.training,
            self.starts + other.starts,
        )

    def hours(self, on_cpu: bool) -> float:
        """On one GPU, or on one core."""
        decoding, training = _CORE if on_cpu else _GPU
        starting = self.starts * _CPU_START if on_cpu else 0.0
        return (self.decoding / decoding + self.training / training + starting) / _HOUR


def describe_table(spec: TableSpec, cells: Sequence[Cell]) -> Table:
    """Cells, traces and GPU hours of each student's rows, and the cost where a price is given.

    Raises BadInputError where a model's or a data set's size is not known.
    """
    on_cpu = cells[0].stages[0].cluster.accelerator == "cpu"
    unit = "core hours" if on_cpu else "GPU hours"
    table = Table("rows", "cells", "steps of training", unit, box=None, title=spec.title)
    least, most = _teachers(cells, _SHORT), _teachers(cells, _LONG)
    table.add_row("teacher's traces, once a task", "", "", _span(least, most, on_cpu))
    for block in spec.blocks:
        ours = [cell for cell in cells if cell.student == block.student]
        low, high = _students(ours, _SHORT), _students(ours, _LONG)
        steps = sum(_steps(config) for _, config in _distinct_stages(ours))
        table.add_row(block.student, str(len(ours)), f"{steps:,}", _span(low, high, on_cpu))
        least, most = least + low, most + high
    table.add_row("all", str(len(cells)), "", _span(least, most, on_cpu))
    price = cells[0].stages[0].cluster.gpu_hour_price
    if price is not None:
        low_cost, high_cost = (price * work.hours(on_cpu) for work in (least, most))
        cost = f"{low_cost:,.0f} to {high_cost:,.0f}"
        table.add_row(f"cost at {price:g} a GPU hour", "", "", cost)
    return table


def _span(least: Work, most: Work, on_cpu: bool) -> str:
    return " to ".join(f"{work.hours(on_cpu):,.1f}" for work in (least, most))


def _teachers(cells: Iterable[Cell], share: float) -> Work:
    """Each teacher answers each task's prompts once a seed, for all cells over the store."""
    asked = {(c.stages[0].teacher.model, c.task, c.seed): c.stages[0] for c in cells}
    return sum((_sampled(config, config.teacher, share) for config in asked.values()), Work())


def _students(cells: Iterable[Cell], share: float) -> Work:
    """Negatives, training and evaluation of cells; the base student's traces once a task."""
    total, sampled = Work(), set()
    for cell, config in _distinct_stages(cells):
        of_base = (cell.task, cell.seed)
        if config.contrasts and config.training.epochs and of_base not in sampled:
            sampled.add(of_base)
            total += _sampled(config, config.student, share)
        for _ in range(_refreshes(config)):
            total += _sampled(config, config.student, share)
        total += _trained(config, share) + _evaluated(config, share) + Work(starts=1)
    return total


def _distinct_stages(cells: Iterable[Cell]) -> list[tuple[Cell, RunConfig]]:
    """The stages of all cells, each that several share once."""
    found = {config.run.folder: (cell, config) for cell in cells for config in cell.stages}
    return list(found.values())


def _refreshes(config: RunConfig) -> int:
    epochs = range(1, config.training.epochs + 1)
    drawn = [draws_from_latest(epoch, config.pairs.phi_in(epoch)) for epoch in epochs]
    return sum(drawn) if config.contrasts else 0


def _sampled(config: RunConfig, model: Model, share: float) -> Work:
    tokens = _prompts(config, 0) * config.sampling.samples * config.sampling.max_new_tokens * share
    return Work(decoding=2 * tokens * _parameters(config, model))


def _evaluated(config: RunConfig, share: float) -> Work:
    tokens = _prompts(config, 1) * config.evaluation_tokens * share * (config.training.epochs + 1)
    return Work(decoding=2 * tokens * _parameters(config, config.student))


def _trained(config: RunConfig, share: float) -> Work:
    responses = (1 + config.contrasts) * config.sampling.max_new_tokens * share
    tokens = _steps(config) * config.training.global_batch * (_PROMPT_TOKENS + responses)
    return Work(training=6 * tokens * _parameters(config, config.student))


def _steps(config: RunConfig) -> int:
    training = config.training
    traces = min(
        config.sampling.samples, config.pairs.positives_per_prompt or config.sampling.samples
    )
    pairs = _prompts(config, 0) * traces * _ASSUMED_RIGHT
    return training.epochs * (training.steps_per_epoch or ceil(pairs / training.global_batch))


def _prompts(config: RunConfig, place: int) -> int:
    given = (config.task.train_prompts, config.task.test_prompts)[place]
    sizes = TASKS[config.task.name].hub_sizes if config.task.name in TASKS else None
    if given is None and sizes is None:
        raise BadInputError(
            f"how many prompts {config.task.name} has is not known before it is loaded: set "
            "task.train_prompts and task.test_prompts"
        )
    return given if given is not None else (sizes or (0, 0))[place]


def _parameters(config: RunConfig, model: Model) -> int:
    known = model.parameters or (config.base_student or model).parameters
    if known is None:
        raise BadInputError(
            f"the size of {model.model} is not known before it is at hand: set `parameters` in its "
            "section"
        )
    return known
