"""Which prompts are for training, validation and test, and which of them a smaller run takes.

Everything goes by digests of the problems themselves: no part depends on the order of rows, and a
problem never moves to another part when rows are added.
"""

from collections.abc import Iterable, Mapping

from cluster.digests import digest_text
from cluster.errors import BadInputError
from pipeline.rows import Prompt
from pipeline.tasks.task import SPLITS, Split

# The shares of a data set that are carved off where it has no such part of its own.
_TEST_SHARE = 0.1
_VALIDATION_SHARE = 0.1


def problem_key(prompt: Prompt) -> str:
    """The same for two prompts that pose one problem, in whatever order their options are."""
    texts = sorted(_plain(text) for text in (prompt.choices or {}).values())
    return digest_text(_plain(prompt.question), *texts)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def part_of(key: str) -> Split:
    """The part that a problem falls in by its key, where all three are carved."""
    share = int(key[:12], 16) / 16**12
    if share < _TEST_SHARE:
        return "test"
    return "validation" if share < _TEST_SHARE + _VALIDATION_SHARE else "train"


def fill_parts(found: Mapping[Split, list[Prompt]]) -> dict[Split, list[Prompt]]:
    """The three parts, those that the data set lacks carved out of its train part.

    Without a train part nothing is carved. A carved part has at least one problem.
    """
    keys = {prompt.prompt_id: problem_key(prompt) for prompt in found.get("train", [])}
    wanted = [split for split in SPLITS if split not in found and "train" in found]
    parts = {key: split for key in keys.values() if (split := part_of(key)) in wanted}
    for split in wanted:
        left = sorted(set(keys.values()) - parts.keys())
        if split not in parts.values() and len(left) > 1:
            parts[left[0]] = split
    filled = {split: list(found.get(split, [])) for split in SPLITS}
    filled["train"] = []
    for prompt in found.get("train", []):
        filled[parts.get(keys[prompt.prompt_id], "train")].append(prompt)
    return filled


def without_repeats(
    parts: Mapping[Split, list[Prompt]],
) -> tuple[dict[Split, list[Prompt]], dict[Split, int]]:
    """The parts without problems that an earlier part has, and how many each of them lost.

    Earlier means train before validation before test.
    """
    seen: set[str] = set()
    kept: dict[Split, list[Prompt]] = {}
    for split in SPLITS:
        kept[split] = [prompt for prompt in parts[split] if problem_key(prompt) not in seen]
        seen |= {problem_key(prompt) for prompt in kept[split]}
    return kept, {split: len(parts[split]) - len(kept[split]) for split in SPLITS}


def first_prompts(
    prompts: Iterable[Prompt], count: int | None, seed: int, what: str
) -> list[Prompt]:
    """The first `count` of a seeded permutation: a larger count only adds to them.

    Raises BadInputError where there are fewer; `what` names them in it.
    """
    ordered = sorted(prompts, key=lambda prompt: digest_text(str(seed), prompt.prompt_id))
    return take(ordered, count, what)


def take(ordered: Iterable[Prompt], count: int | None, what: str) -> list[Prompt]:
    """The first `count` of prompts that are in order; all if it is None.

    Raises BadInputError where there are fewer; `what` names them in it.
    """
    taken: list[Prompt] = []
    for prompt in ordered:
        if len(taken) == count:
            break
        taken.append(prompt)
    if count is not None and len(taken) < count:
        raise BadInputError(
            f"{count} prompts asked of {what}, which has {len(taken)}: ask for at most that many"
        )
    return taken
