"""A table in the papers' layout: rows of arms below each student, tasks as columns."""

import csv
import io
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.sections import Teacher
from evals.tables.figures import AGREEMENT, MEAN, Figure, Row, measured, teachers_cells
from evals.tables.spec import Cell, TableSpec

TEACHER_ROW = "teacher"
NOTE = (
    "Ours in percent, mean ± standard error (over seeds, or of one proportion where there is one "
    "seed); bold: within the 95 % interval of the student's best; [brackets]: the paper's, each "
    "column in the paper's own unit."
)


@dataclass(frozen=True)
class Line:
    """One row: a student's arm, or a teacher."""

    student: str
    arm: str
    figures: Row
    published: dict[str, float]  # by column, in the paper's own unit


def lines_of(spec: TableSpec, cells: Sequence[Cell]) -> list[Line]:
    """The rows of all blocks, as far as their cells are done, the teachers' at the end."""
    lines = []
    for block in spec.blocks:
        for arm in block.arms:
            ours = [cell for cell in cells if (cell.student, cell.arm) == (block.student, arm)]
            published = spec.published.get(block.student, {}).get(arm, {})
            lines.append(Line(block.student, arm, measured(ours, arm, spec.agreement), published))
    for name, taught in teachers_of(cells).items():
        published = spec.published.get(name, {}).get(TEACHER_ROW, {})
        row = measured(teachers_cells(taught), None, False)
        lines.append(Line(name, TEACHER_ROW, row, published))
    return lines


def teachers_of(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The cells that each teacher has, by the name of its row: TEACHER_ROW where it is alone."""
    of_student: dict[str, list[Cell]] = {}
    for cell in cells:
        of_student.setdefault(cell.student, []).append(cell)
    # What a task changes of the teacher, such as its worked examples, is not another teacher: a row
    # has all tasks.
    taught: dict[Hashable, list[Cell]] = {}
    for ours in of_student.values():
        by_task = {cell.task: _identity(cell.stages[-1].teacher) for cell in ours}
        taught.setdefault(tuple(by_task.items()), []).extend(ours)
    if len(taught) == 1:
        return {TEACHER_ROW: next(iter(taught.values()))}
    names = [_name(cell.stages[-1].teacher for cell in ours) for ours in taught.values()]
    return dict(zip(_numbered(names), taught.values(), strict=True))


def _identity(teacher: Teacher) -> Hashable:
    return teacher.model, teacher.endpoint and teacher.endpoint.url, teacher.few_shot


def _name(teachers: Iterable[Teacher]) -> str:
    """What a reader calls the teacher, or the teachers where tasks have one each."""
    names = (
        f"{teacher.title}, shown {len(teacher.few_shot)} worked examples"
        if teacher.few_shot
        else teacher.title
        for teacher in teachers
    )
    return " / ".join(dict.fromkeys(names))


def _numbered(names: list[str]) -> list[str]:
    """The names, those that are there twice with a number."""
    return [
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def columns_of(spec: TableSpec, lines: list[Line]) -> list[str]:
    """The columns that have figures, ours or the paper's: tasks first, MEAN and AGREEMENT last."""
    found = dict.fromkeys(column for line in lines for column in (*line.figures, *line.published))
    order = [*spec.tasks, *found]
    tasks = [c for c in dict.fromkeys(order) if c in found and c not in (MEAN, AGREEMENT)]
    return [*tasks, *(column for column in (MEAN, AGREEMENT) if column in found)]


def markdown(spec: TableSpec, lines: list[Line]) -> str:
    """The table as Markdown; bold is what lies within the 95 % interval of its student's best."""
    head, rows = head_of(spec, lines), rows_of(spec, lines)
    texts = [[shown.markdown for shown in row] for row in rows]
    bars = ["|".join(["", *(f" {text} " for text in row), ""]) for row in (head, *texts)]
    rule = "|" + "---|" * len(head)
    return "\n".join([f"# {spec.title}", "", NOTE, "", bars[0], rule, *bars[1:], ""])


def page(spec: TableSpec, lines: list[Line]) -> str:
    """The table as an HTML page without a script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = FileSystemLoader(Path(__file__).parents[1] / "templates")
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("table.html").render(
        spec=spec, head=head_of(spec, lines), rows=rows_of(spec, lines), note=NOTE
    )


@dataclass(frozen=True)
class Shown:
    """What stands in one place of a table."""

    text: str
    best: bool = False
    published: str = ""

    @property
    def markdown(self) -> str:
        """The text, bold where it is best, and the paper's number."""
        text = f"**{self.text}**" if self.best else self.text
        return f"{text} [{self.published}]" if self.published else text


def head_of(spec: TableSpec, lines: list[Line]) -> list[str]:
    """The names of all columns."""
    return ["student", "arm", *columns_of(spec, lines), "n", "seeds"]


def rows_of(spec: TableSpec, lines: list[Line]) -> list[list[Shown]]:
    """What stands in each row, from left to right."""
    columns = columns_of(spec, lines)
    return [_row(line, lines, columns) for line in lines]


def _row(line: Line, lines: list[Line], columns: list[str]) -> list[Shown]:
    rivals = [other for other in lines if other.student == line.student]
    some = next(iter(line.figures.values()), None)
    counts = (str(some.n), str(some.seeds)) if some else ("–", "–")
    return [
        Shown(line.student),
        Shown(line.arm.replace("_", " ")),
        *(_shown(line, column, rivals) for column in columns),
        *map(Shown, counts),
    ]


def _shown(line: Line, column: str, rivals: list[Line]) -> Shown:
    published = f"{line.published[column]:.2f}" if column in line.published else ""
    figure = line.figures.get(column)
    if figure is None:
        return Shown("–", published=published)
    best = len(rivals) > 1 and figure.mean >= _bar(column, rivals)
    return Shown(f"{figure.mean:.1f} ± {figure.standard_error:.1f}", best, published)


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
                number = "" if published is None else published
                writer.writerow([line.student, line.arm, column, *found, number])
    return text.getvalue()
