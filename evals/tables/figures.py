"""The figures of a table: read from the cells' runs, joined over seeds."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import fmean
from typing import Any

from upath import UPath

from cluster import storage
from cluster.config import RunConfig
from cluster.run_folder import RunFolder
from evals.stage import answers_file
from evals.statistics import mean_and_standard_error, proportion_standard_error
from evals.tables.spec import ZERO_SHOT, Cell
from serving.models import (
    BASE,
    TEACHER,
    best_epoch,
    evaluation_name,
    student_id,
    trained_epochs,
)

MEAN = "mean"
AGREEMENT = "agreement"


@dataclass(frozen=True)
class Figure:
    """One number of a table, in percent."""

    mean: float
    standard_error: float  # over seeds; that of the one proportion where there is one seed
    n: int  # answers in all
    seeds: int

    @property
    def half_interval(self) -> float:
        """Half of a 95 % interval."""
        return 1.96 * self.standard_error


Row = dict[str, Figure]  # by column


def is_done(cell: Cell) -> bool:
    """Whether all of a cell's stages are done."""
    return is_finished(cell.stages[-1])


def is_finished(stage: RunConfig) -> bool:
    """Whether a stage's run has come to its end."""
    return _run_of(stage).finished_file.exists()


def measured(cells: Iterable[Cell], arm: str | None, agreement: bool) -> Row:
    """The row of cells that differ in task and seed alone; those that are not done are left out.

    The student is the best epoch's by validation, or for zero-shot the base one; with `arm` None
    it is the teacher, as the cells evaluated it. Columns are tasks, or a task's kinds of prompts
    where it has several, their mean, and the agreement with the teacher where asked.
    """
    of_column: dict[str, list[tuple[float, int]]] = {}
    of_seed: dict[int, list[float]] = {}
    cells = list(cells)
    done = [cell for cell in cells if is_done(cell)]
    for cell in done:
        file = chosen_result(cell, arm)
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        for column, found in _columns(cell, result).items():
            of_column.setdefault(column, []).append((found["accuracy"], found["n"]))
            of_seed.setdefault(cell.seed, []).append(100 * found["accuracy"])
        if agreement and arm is not None:
            of_column.setdefault(AGREEMENT, []).append((_agreement(cell, file), result["n"]))
    row = {column: _join(values) for column, values in of_column.items()}
    tasks = [column for column in row if column != AGREEMENT]
    every_task = {cell.task for cell in done} == {cell.task for cell in cells}
    if len(tasks) > 1 and every_task:
        row[MEAN] = _mean([row[column] for column in tasks], of_seed.values())
    return row


def teachers_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Of cells that have one teacher, one for each task and seed: all evaluate the same answers.

    More of them would count as further seeds. It is one that is done, where there is one.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.seed), []).append(cell)
    return [
        next((c for c in group if c.stages[-1].evaluation.teacher and is_done(c)), group[0])
        for group in groups.values()
    ]


def _run_of(stage: RunConfig) -> RunFolder:
    return RunFolder(storage.location(stage.run.folder))


def chosen_result(cell: Cell, arm: str | None) -> UPath:
    """The file of the result that counts: the best epoch's, the base student's, the teacher's."""
    config = cell.stages[-1]
    run = _run_of(config)
    epoch = best_epoch(run, trained_epochs(run, config))
    trained = student_id(epoch) if epoch else BASE
    model = TEACHER if arm is None else BASE if arm == ZERO_SHOT else trained
    return run.evaluation(evaluation_name(model, "test"))


def _columns(cell: Cell, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return result.get("by_kind") or {cell.task: result}


def _agreement(cell: Cell, result: UPath) -> float:
    """The share of test prompts on which a student's answer is the teacher's, both parsed."""
    ours, teachers = _answers(result), _answers(chosen_result(cell, None))
    same = [ours.get(key) == answer for key, answer in teachers.items() if answer is not None]
    return sum(same) / max(1, len(teachers))


def _answers(result: UPath) -> dict[str, str | None]:
    table = storage.read_parquet(answers_file(result), ["prompt_id", "answer"])
    return dict(zip(*(table[column].to_pylist() for column in table.column_names), strict=True))


def _join(values: list[tuple[float, int]]) -> Figure:
    shares, n = [100 * share for share, _ in values], sum(count for _, count in values)
    if len(shares) > 1:
        return Figure(*mean_and_standard_error(shares), n, len(shares))
    return Figure(shares[0], 100 * proportion_standard_error(round(values[0][0] * n), n), n, 1)


def _mean(columns: list[Figure], of_seeds: Iterable[list[float]]) -> Figure:
    """The mean of columns, with its error over the seeds that have all of them.

    A student that is better on one task is better on the others, so their errors over seeds are not
    independent. Those of one seed, of proportions on other problems, are.
    """
    size, n = len(columns), sum(figure.n for figure in columns)
    means = [fmean(shares) for shares in of_seeds if len(shares) == size]
    if len(means) > 1:
        return Figure(*mean_and_standard_error(means), n, len(means))
    error = sqrt(sum(figure.standard_error**2 for figure in columns)) / size
    return Figure(fmean(figure.mean for figure in columns), error, n, 1)
