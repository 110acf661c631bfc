"""From the task section of a configuration to the prompts of one split."""

from collections.abc import Iterable
from itertools import chain
from typing import Literal

from cluster import sections
from cluster.errors import BadInputError
from cluster.progress import say
from pipeline.rows import Prompt
from pipeline.tasks.catalogue import TASKS
from pipeline.tasks.sources import Located, find_files, looks_local, read_file, read_hub
from pipeline.tasks.splits import (
    fill_parts,
    first_prompts,
    problem_key,
    take,
    without_repeats,
)
from pipeline.tasks.task import SPLITS, Split, Task


def load_prompts(
    section: sections.Task, split: Split | Literal["all"], seed: int
) -> list[Prompt]:
    """The prompts of a split: the first N of a seeded permutation, N as the section gives it.

    "all" is every prompt that the data has, whatever its split, for evaluating on a file; its N is
    `test_prompts`. Raises BadInputError for data that are missing, empty, malformed, without gold
    answers, with an id twice, or fewer than asked.
    """
    task = _task(section.name)
    count = section.train_prompts if split == "train" else section.test_prompts
    count = section.validation_prompts if split == "validation" else count
    what = f"{section.data or task.name} ({split})"
    if task.generate is not None and section.data is None:
        splits = SPLITS if split == "all" else (split,)
        made = (task.generate(part, seed, section.largest_operand) for part in splits)
        return take(chain.from_iterable(made), count, what)
    parts = _load_parts(task, section.data)
    chosen = list(chain(*parts.values())) if split == "all" else parts[split]
    if not chosen:
        raise BadInputError(
            f"{what} has no prompts, got {_counts(parts)}: add a file of that split, or a train "
            "part of three problems or more, from which the others are carved"
        )
    return first_prompts(chosen, count, seed, what)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise BadInputError(f"task.name={name!r} is no task, expected one of {', '.join(TASKS)}")
    return TASKS[name]


def _load_parts(task: Task, data: str | None) -> dict[Split, list[Prompt]]:
    parts: dict[Split, list[Prompt]] = {}
    for split, rows in _raw_parts(task, data).items():
        parts[split] = _read_prompts(task, rows)
        if not parts[split]:
            raise BadInputError(
                f"the {split} part of {data or task.hub_id} is empty: expected rows with "
                f"{', '.join(task.columns)}"
            )
    kept, lost = without_repeats(fill_parts(parts))
    for split, number in lost.items():
        if number:
            say(f"{task.name}: {number} {split} prompts repeat another part's and are left out")
    return kept


def _raw_parts(task: Task, data: str | None) -> dict[Split, Located]:
    source = data or task.hub_id
    assert source is not None  # a task without a home on the hub makes its own prompts
    if not looks_local(source):
        return read_hub(source, task.hub_config if source == task.hub_id else None)
    files = find_files(source)
    return {split: chain.from_iterable(map(read_file, files[split])) for split in files}


def _read_prompts(task: Task, rows: Located) -> list[Prompt]:
    """The prompts of raw rows. A row without an id of its own that repeats another is skipped."""
    prompts: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    for where, row in rows:
        try:
            prompt = task.prompt(row)
        except BadInputError as error:
            raise BadInputError(f"{where}: {error}") from None
        ...
    return list(prompts.values())


def _counts(parts: dict[Split, list[Prompt]]) -> str:
    return ", ".join(f"{split} {len(prompts)}" for split, prompts in parts.items())
