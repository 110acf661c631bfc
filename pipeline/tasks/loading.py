"""From the task section of a configuration to the prompts of one split."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from cluster import sections
from cluster.errors import BadInputError
from cluster.progress import say
from pipeline.rows import Prompt
from pipeline.tasks.catalogue import TASKS
from pipeline.tasks.faults import BadRowError, Faults
from pipeline.tasks.sources import Located, find_files, looks_local, read_file, read_hub
from pipeline.tasks.splits import fill_parts, first_prompts, take, without_repeats
from pipeline.tasks.task import SPLITS, Row, Split, Task


def load_prompts(section: sections.Task, split: Split | Literal["all"], seed: int) -> list[Prompt]:
    """The prompts of a split: the first N of a seeded permutation, N as the section gives it.

    "all" is every prompt that the data has, whatever its split, for evaluating on a file; its N is
    `test_prompts`. Rows that cannot be used are left out, and the user is told. Raises
    BadInputError for data that are missing, empty or malformed, with a larger share of such rows
    than `max_error_share`, or fewer than asked.
    """
    task = _task(section.name)
    count = _count(section, split)
    what = f"{section.data or task.name} ({split})"
    splits = SPLITS if split == "all" else (split,)
    makes_its_own = task.generate is not None and section.data is None
    if section.largest_operand is not None and not (makes_its_own and task.name == "word_problems"):
        raise BadInputError(
            f"task.largest_operand={section.largest_operand} is for the problems that "
            f"word_problems makes itself, and not for {what}: set it to null"
        )
    if makes_its_own:
        assert task.generate is not None
        made = [task.generate(section, part, seed) for part in splits]
        return take(chain.from_iterable(made), count, what)
    found = _load_parts(task, section)
    _tell_left_out(task, [found[part] for part in splits if part in found], what)
    whole = {split: part.prompts for split, part in found.items()}
    parts, lost = without_repeats(fill_parts(whole))
    if repeats := sum(lost[part] for part in splits):
        say(f"{what}: left out {repeats} prompts that repeat another part's")
    chosen = list(chain.from_iterable(parts[part] for part in splits))
    if not chosen:
        counts = ", ".join(f"{part} {len(prompts)}" for part, prompts in parts.items())
        raise BadInputError(
            f"{what} has no prompts, got {counts}: add a file of that split, or a train part of "
            "three problems or more, from which the others are carved"
        )
    if split == "train" and (carved := [part for part in SPLITS if part not in found]):
        what += f", without those set aside as {' and '.join(carved)}"
    return first_prompts(chosen, count, seed, what)


def _count(section: sections.Task, split: Split | Literal["all"]) -> int | None:
    match split:
        case "train":
            return section.train_prompts
        case "validation":
            return section.validation_prompts
    return section.test_prompts


def _task(name: str) -> Task:
    if name not in TASKS:
        raise BadInputError(f"task.name={name!r} is no task, expected one of {', '.join(TASKS)}")
    return TASKS[name]


@dataclass
class _Part:
    """What the rows of one part of the data became."""

    rows: int = 0
    skipped: int = 0  # by the task
    faults: Faults = field(default_factory=Faults)
    columns: set[str] = field(default_factory=set)  # that any row has
    known: dict[str, tuple[Prompt, str]] = field(default_factory=dict)  # with its place, by id

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts in the order of the rows."""
        return [prompt for prompt, _ in self.known.values()]

    def read(self, task: Task, where: str, row: Row) -> None:
        """Take a row, or count its fault."""
        self.rows += 1
        self.columns.update(str(name).strip() for name in row)
        try:
            prompt = task.prompt(row)
            if prompt is None:
                self.skipped += 1
            else:
                self._add(prompt, where)
        except BadRowError as error:
            self.faults.add(where, error)

    def _add(self, prompt: Prompt, where: str) -> None:
        """Add a prompt, of rows that are the same the first."""
        first, place = self.known.setdefault(prompt.prompt_id, (prompt, where))
        if (first.question, first.choices) != (prompt.question, prompt.choices):
            raise BadRowError(
                "an id that another row has",
                f"has the id {prompt.prompt_id!r} of {place}, and another problem: give each row "
                "its own id, or leave the column out",
            )
        if first.gold != prompt.gold and prompt.kind != "open":
            raise BadRowError(
                "another gold answer than the same problem before",
                f"the gold answer is {prompt.gold!r}, and {first.gold!r} at {place}, which has the "
                "same problem: keep the right one",
            )


def _load_parts(task: Task, section: sections.Task) -> dict[Split, _Part]:
    """Each part that the data has. Raises BadInputError where too many of its rows have faults."""
    source = section.data or task.hub_id
    assert source is not None  # a task without a home on the hub makes its own prompts
    parts: dict[Split, _Part] = {}
    for split, rows in _raw_parts(task, source).items():
        part = parts[split] = _Part()
        for where, row in rows:
            part.read(task, where, row)
        _check_part(task, part, f"{source} ({split})", section.max_error_share)
    return parts


def _check_part(task: Task, part: _Part, what: str, max_error_share: float) -> None:
    if part.rows and (missing := task.missing(part.columns)):
        raise BadInputError(
            f"{what} has no column {missing}, got {', '.join(sorted(part.columns))}; {task.name} "
            f"expects {task.expects}: rename the columns"
        )
    part.faults.check(what, part.rows, max_error_share)
    if not part.known:
        raise BadInputError(f"{what} is empty: expected rows with {task.expects}")


def _tell_left_out(task: Task, parts: Iterable[_Part], what: str) -> None:
    for part in parts:
        if part.skipped:
            say(f"{what}: left out {part.skipped} {task.skips}")
        if part.faults.rows:
            say(f"{what}: left out {part.faults.rows} of {part.rows} rows: {part.faults}")


def _raw_parts(task: Task, source: str) -> dict[Split, Located]:
    if not looks_local(source):
        return read_hub(source, task.hub_config if source == task.hub_id else None)
    files = find_files(source)
    return {split: chain.from_iterable(map(read_file, files[split])) for split in files}
