"""A table in the papers' layout: rows of arms below each student, tasks as columns."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from evals.tables.figures import AGREEMENT, MEAN, Figure, Row, measured
from evals.tables.spec import Cell, TableSpec

TEACHER_ROW = "teacher"


@dataclass(frozen=True)
class Line:
    """One row: a student's arm, or the teacher."""

    student: str
    arm: str
    figures: Row
    published: dict[str, float]  # by column, in percent


def lines_of(spec: TableSpec, cells: Sequence[Cell]) -> list[Line]:
    """The rows of all blocks, as far as their cells are done, the teacher's at the end."""
    lines = []
    for block in spec.blocks:
        for arm in block.arms:
            ours = [cell for cell in cells if (cell.student, cell.arm) == (block.student, arm)]
            published = spec.published.get(block.student, {}).get(arm, {})
            lines.append(Line(block.student, arm, measured(ours, arm, spec.agreement), published))
    first = spec.blocks[0]
    ours = [cell for cell in cells if (cell.student, cell.arm) == (first.student, first.arms[0])]
    published = spec.published.get(TEACHER_ROW, {}).get(TEACHER_ROW, {})
    lines.append(Line(TEACHER_ROW, TEACHER_ROW, measured(ours, None, False), published))
    return lines


def columns_of(spec: TableSpec, lines: list[Line]) -> list[str]:
    """The columns that have figures, tasks first."""
    found = dict.fromkeys(column for line in lines for column in line.figures)
    tasks = [column for column in found if column not in (MEAN, AGREEMENT)]
    tasks = [task for task in spec.tasks if task in tasks] or tasks
    return [*tasks, *(column for column in (MEAN, AGREEMENT) if column in found)]


def markdown(spec: TableSpec, lines: list[Line]) -> str:
    """The table as Markdown; bold is what lies within the 95 % interval of its student's best."""
    columns = columns_of(spec, lines)
    head = ["student", "arm", *columns, "n", "seeds"]
    rows = [_cells(line, lines, columns) for line in lines]
    bars = ["|".join(["", *(f" {text} " for text in row), ""]) for row in (head, *rows)]
    rule = "|" + "---|" * len(head)
    note = (
        "Percent, mean ± standard error (over seeds, or of one proportion where there is one "
        "seed); bold: within the 95 % interval of the student's best; [brackets]: the paper's."
    )
    return "\n".join([f"# {spec.title}", "", note, "", bars[0], rule, *bars[1:], ""])


def _cells(line: Line, lines: list[Line], columns: list[str]) -> list[str]:
    rivals = [other for other in lines if other.student == line.student]
    shown = [_shown(line, column, rivals) for column in columns]
    some = next(iter(line.figures.values()), None)
    counts = [str(some.n), str(some.seeds)] if some else ["–", "–"]
    return [line.student, line.arm.replace("_", " "), *shown, *counts]


def _shown(line: Line, column: str, rivals: list[Line]) -> str:
    figure = line.figures.get(column)
    text = "–" if figure is None else f"{figure.mean:.1f} ± {figure.standard_error:.1f}"
    if figure is not None and len(rivals) > 1 and figure.mean >= _bar(column, rivals):
        text = f"**{text}**"
    published = line.published.get(column)
    return text if published is None else f"{text} [{published:.2f}]"


def _bar(column: str, rivals: list[Line]) -> float:
    """The lower end of the best's interval."""
    figures = [line.figures[column] for line in rivals if column in line.figures]
    best: Figure = max(figures, key=lambda figure: figure.mean)
    return best.mean - best.half_interval


def as_csv(spec: TableSpec, lines: list[Line]) -> str:
    """A line for each figure: student, arm, column, mean, standard error, n, seeds, published."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["student", "arm", "column", "mean", "standard_error", "n", "seeds", "published"]
    )
    for line in lines:
        for column in columns_of(spec, lines):
            figure = line.figures.get(column)
            published = line.published.get(column)
            if figure is not None or published is not None:
                found = (
                    [f"{figure.mean:.4f}", f"{figure.standard_error:.4f}", figure.n, figure.seeds]
                    if figure
                    else [""] * 4
                )
                writer.writerow([line.student, line.arm, column, *found, published or ""])
    return text.getvalue()
