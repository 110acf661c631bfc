"""From the task section of a configuration to the prompts of one split."""

from itertools import chain
from typing import Literal

from cluster import sections
from cluster.errors import BadInputError
from cluster.progress import say
from pipeline.rows import Prompt
from pipeline.tasks.catalogue import TASKS
from pipeline.tasks.sources import Located, find_files, looks_local, read_file, read_hub
from pipeline.tasks.splits import fill_parts, first_prompts, take, without_repeats
from pipeline.tasks.task import SPLITS, Split, Task, digest_problem


def load_prompts(section: sections.Task, split: Split | Literal["all"], seed: int) -> list[Prompt]:
    """The prompts of a split: the first N of a seeded permutation, N as the section gives it.

    "all" is every prompt that the data has, whatever its split, for evaluating on a file; its N is
    `test_prompts`. Raises BadInputError for data that are missing, empty, malformed, without gold
    answers, with an id twice, or fewer than asked.
    """
    task = _task(section.name)
    count = _count(section, split)
    what = f"{section.data or task.name} ({split})"
    splits = SPLITS if split == "all" else (split,)
    if task.generate is not None and section.data is None:
        made = [task.generate(section, part, seed) for part in splits]
        return take(chain.from_iterable(made), count, what)
    found, skipped = _load_parts(task, section.data)
    if rows := sum(skipped.get(part, 0) for part in splits):
        say(f"{what}: left out {rows} {task.skips}")
    parts, lost = without_repeats(fill_parts(found))
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


def _load_parts(task: Task, data: str | None) -> tuple[dict[Split, list[Prompt]], dict[Split, int]]:
    """The prompts of each part that the data has, and how many of its rows the task skips."""
    source = data or task.hub_id
    assert source is not None  # a task without a home on the hub makes its own prompts
    parts: dict[Split, list[Prompt]] = {}
    skipped: dict[Split, int] = {}
    for split, rows in _raw_parts(task, source).items():
        parts[split], skipped[split] = _read_prompts(task, rows, f"{source} ({split})")
    return parts, skipped


def _raw_parts(task: Task, source: str) -> dict[Split, Located]:
    if not looks_local(source):
        return read_hub(source, task.hub_config if source == task.hub_id else None)
    files = find_files(source)
    return {split: chain.from_iterable(map(read_file, files[split])) for split in files}


def _read_prompts(task: Task, rows: Located, what: str) -> tuple[list[Prompt], int]:
    """The prompts of raw rows, of rows without an id that are the same the first; the skipped."""
    prompts: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    skipped = 0
    for where, row in rows:
        try:
            prompt = task.prompt(row)
        except BadInputError as error:
            raise BadInputError(f"{where}: {error}") from None
        if prompt is None:
            skipped += 1
            continue
        known = prompts.setdefault(prompt.prompt_id, prompt)
        place = places.setdefault(prompt.prompt_id, where)
        if place != where and known.prompt_id != digest_problem(prompt.question, prompt.choices):
            raise BadInputError(
                f"{where} has the id {prompt.prompt_id!r} of {place}: give each row its own id, or "
                "leave the column out"
            )
    if not prompts:
        raise BadInputError(f"{what} is empty: expected rows with {task.expects}")
    return list(prompts.values()), skipped
