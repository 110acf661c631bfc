"""What a table would cost, from sizes alone: neither weights nor data need be at hand."""

from collections.abc import Iterable, Sequence
from functools import partial

from rich.table import Table

from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.placement import matches
from cluster.sections import Model
from cluster.speed import Span, Work, caveat, hours_between
from evals.tables.spec import Cell, TableSpec
from pipeline.hub import known_shape
from pipeline.work import (
    Sizes,
    base_rounds,
    count_steps,
    evaluated,
    known_sizes,
    local_models,
    local_teachers,
    sampled,
    scored,
    student_rounds,
    trained,
)

Hours = list[Span]  # of decoding and of training, on one device


def describe_table(spec: TableSpec, cells: Sequence[Cell]) -> Table:
    """Cells, traces and GPU hours of each student's rows, and the cost where nodes have prices.

    Raises BadInputError where a model's or a data set's size is not known.
    """
    config = cells[0].stages[0]
    on_gpu = config.cluster.accelerator != "cpu"
    unit = "GPU hours" if on_gpu else "core hours"
    table = Table("rows", "cells", "steps of training", unit, box=None, title=spec.title)
    every = [hours_between(partial(_of_teachers, cells), on_gpu)]
    table.add_row("teacher's traces, once a task", "", "", _between(every[0]))
    for block in spec.blocks:
        ours = [cell for cell in cells if cell.student == block.student]
        every.append(hours_between(partial(_of_students, ours), on_gpu))
        steps = sum(count_steps(stage, sizes_of(stage)) for _, stage in distinct_stages(ours))
        table.add_row(block.student, str(len(ours)), f"{steps:,}", _between(every[-1]))
    decoding, training = (sum(part, Span(0, 0)) for part in zip(*every, strict=True))
    table.add_row("all", str(len(cells)), "", _between([decoding, training]))
    prices = _device_price(config, "sampling_nodes"), _device_price(config, "training_nodes")
    if prices[0] is not None and prices[1] is not None:
        cost = decoding.times(prices[0]) + training.times(prices[1])
        table.add_row("cost, by cluster.nodes", "", "", f"{cost.low:,.0f} to {cost.high:,.0f}")
    table.caption = f"Hours are {caveat(on_gpu)}."
    return table


def _between(hours: Hours) -> str:
    whole = hours[0] + hours[1]
    return f"{whole.low:,.1f} to {whole.high:,.1f}"


def _device_price(config: RunConfig, option: str) -> float | None:
    """What an hour of a GPU costs on the cheapest nodes that a stage may use; None if untold."""
    selector = getattr(config.cluster, option)
    prices = [
        group.price_per_hour / group.gpus
        for group in config.cluster.nodes
        if group.gpus and group.price_per_hour is not None and matches(selector, group.labels)
    ]
    return min(prices, default=None)


def _of_teachers(cells: Iterable[Cell], share: float) -> Work:
    """Each teacher answers each task's prompts once a seed, for all cells over the store."""
    asked = {
        (teacher.model, cell.task, cell.seed): (teacher, cell.stages[0])
        for cell in cells
        for teacher in local_teachers(cell.stages[0]).values()
    }
    work = (
        sampled(config, sizes_of(config), _parameters(config, teacher), share)
        for teacher, config in asked.values()
    )
    return sum(work, Work())


def _of_students(cells: Iterable[Cell], share: float) -> Work:
    """Negatives, training and evaluation of cells; the base student's traces once a task."""
    total, with_traces = Work(), set()
    for cell, config in distinct_stages(cells):
        of_base, rounds = (cell.task, cell.seed), student_rounds(config)
        if base_rounds(config):
            rounds -= of_base in with_traces
            with_traces.add(of_base)
        total += _of_stage(config, rounds, share)
    return total


def _of_stage(config: RunConfig, rounds: int, share: float) -> Work:
    """One stage of a cell, with so many rounds of sampling its student."""
    sizes = sizes_of(config)
    models = {name: _parameters(config, model) for name, model in local_models(config).items()}
    size = models["student"]
    work = [sampled(config, sizes, size, share) for _ in range(rounds)]
    work += [of(config, sizes, models, share) for of in (scored, evaluated)]
    return sum(work, trained(config, sizes, size, share))


def distinct_stages(cells: Iterable[Cell]) -> list[tuple[Cell, RunConfig]]:
    """The stages of all cells, each that several share once."""
    found = {config.run.folder: (cell, config) for cell in cells for config in cell.stages}
    return list(found.values())


def sizes_of(config: RunConfig) -> Sizes:
    """How many prompts a task has. Raises BadInputError where that is not known yet."""
    sizes = known_sizes(config.task)
    if sizes is None:
        raise BadInputError(
            f"how many prompts {config.task.name} has is not known before it is loaded: set "
            "task.train_prompts and task.test_prompts"
        )
    return sizes


def _parameters(config: RunConfig, model: Model) -> int:
    for known in (model, config.base_student or model):
        shape = known_shape(known.model)
        size = known.parameters or (shape.parameters if shape else None)
        if size:
            return size
    raise BadInputError(
        f"the size of {model.model} is not known before it is at hand: set `parameters` in its "
        "section"
    )
