"""What a table is made of: `configs/tables/NAME.yaml`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.recipes import load_recipe, student_of
from cluster.sections import Section
from cluster.validation import NOT_YAML, described

Options = dict[str, Any]  # dotted option -> value, over the recipe
ZERO_SHOT = "zero_shot_cot"


class Block(Section):
    """The rows of one student."""

    student: str
    """Its name in the table."""
    recipe: str | None = None
    """The recipe of its cells, where it is not the table's."""
    options: Options = Field(default_factory=dict)
    """What its runs change in the recipe, such as student.model."""
    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of arms, in the order of the rows."""


class TableSpec(Section):
    """A table: the cells, and what was published of them."""

    title: str
    """The headline."""
    recipe: str
    """The recipe that every cell runs, relative to this file."""
    folder: str
    """Where the runs of the cells and the table itself lie: a path or a URL."""
    options: Options = Field(default_factory=dict)
    """What every cell changes in the recipe."""
    blocks: Annotated[tuple[Block, ...], Field(min_length=1)]
    """Students with their arms."""
    tasks: Annotated[dict[str, Options], Field(min_length=1)]
    """Columns by name, each with what it changes in the recipe."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Each cell is run with each of these."""
    agreement: bool = False
    """Also how often the student gives the teacher's answer."""
    published: dict[str, dict[str, dict[str, float]]] = Field(default_factory=dict)
    """The paper's numbers, where the setting is the paper's: student -> arm -> column -> number, in
    the paper's own unit. The teacher's are under `teacher`, again `teacher`; where students have
    several teachers, each one's are under the name of its row (its model), then `teacher`."""


@dataclass(frozen=True)
class Cell:
    """One run of one arm, student and task with one seed."""

    student: str
    arm: str
    task: str
    seed: int
    stages: tuple[RunConfig, ...]

    @property
    def name(self) -> str:
        """For the user."""
        return f"{self.student}, {self.arm}, {self.task}, seed {self.seed}"


def is_table(path: Path) -> bool:
    """Whether a file is a table and not a recipe."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except NOT_YAML:
        return False
    return isinstance(raw, dict) and "blocks" in raw


def load_table(path: Path) -> tuple[TableSpec, list[Cell]]:
    """A table and its cells, all of whose configurations are valid. Raises BadInputError."""
    if not path.is_file():
        raise BadInputError(f"no table at {path}: give the path of a YAML file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        spec = TableSpec.model_validate(raw)
    except ValidationError as error:
        raise BadInputError(f"{path} is no table: {described(error, TableSpec)}") from None
    except NOT_YAML as error:
        raise BadInputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    cells = list(_cells(spec, path.parent))
    if spec.agreement and not all(cell.stages[-1].evaluation.teacher for cell in cells):
        raise BadInputError(
            f"{path}: agreement=true compares with the teacher, which evaluation.teacher=false "
            "leaves out: change one of the two"
        )
    return spec, cells


def _cells(spec: TableSpec, place: Path) -> Iterator[Cell]:
    """Seed by seed, so that a table that is half done has whole columns."""
    known: dict[str, str] = {}
    for seed, block, (task, of_task) in product(spec.seeds, spec.blocks, spec.tasks.items()):
        recipe = place / (block.recipe or spec.recipe)
        for arm in block.arms:
            name = "/".join([_slug(block.student), arm, _slug(task), f"seed_{seed}"])
            options = spec.options | block.options | of_task | {"run.seed": seed}
            options["run.folder"] = f"{spec.folder.rstrip('/')}/{name}"
            stages = load_recipe(recipe, arm=arm, options=options)
            yield Cell(block.student, arm, task, seed, tuple(_share(stages, known)))


def _share(stages: Iterable[RunConfig], known: dict[str, str]) -> Iterator[RunConfig]:
    """The stages, each that an earlier cell has too in the folder that it has there: it runs once.

    `known` maps what a stage is to its folder.
    """
    before: RunConfig | None = None
    for stage in stages:
        if before:
            student = stage.student.model_copy(update=student_of(before))
            stage = stage.model_copy(update={"student": student})
        run = stage.run.model_copy(update={"folder": ""})
        what = stage.model_copy(update={"run": run}).model_dump_json()
        run = run.model_copy(update={"folder": known.setdefault(what, stage.run.folder)})
        before = stage.model_copy(update={"run": run})
        yield before


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_")
