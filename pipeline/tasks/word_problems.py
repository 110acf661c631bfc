"""One-step word problems that the project makes itself, so that a first run needs no data set.

A problem is one of twelve wordings of +, -, x and /, with a name, a thing and operands of at most
`largest_operand`: sums and products of two numbers from 2; products turned round, for exact
quotients; differences whose answer is above 0. Each distinct text belongs to one part by its
digest, so that the parts share no problem, whatever the sizes asked for.
"""

import random
from collections.abc import Iterator

from cluster import sections
from cluster.errors import BadInputError
from pipeline.rows import Prompt
from pipeline.tasks import gsm8k
from pipeline.tasks.splits import part_of, problem_key
from pipeline.tasks.task import Split, Task, digest_problem

_DEFAULT_LARGEST = 9
_LARGEST = 99  # a hundred operands make millions of problems

_NAMES = ("Tom", "Ana", "Ben", "Mia", "Sam", "Lily", "Omar", "Zoe")
_THINGS = ("apples", "pens", "books", "coins", "cards", "shells")

# {a} and {b} are the operands; the answer is named beside each wording.
_WORDINGS = (
    ("sum", "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"),
    (
        "sum",
        "{name} finds {a} {things} in the morning and {b} {things} in the evening. "
        "How many {things} does {name} find in all?",
    ),
    (
        "sum",
        "There are {a} {things} on the table and {name} adds {b} more. "
        "How many {things} are on the table now?",
    ),
    ("a", "{name} has {sum} {things} and gives away {b}. How many {things} are left?"),
    ("a", "{name} had {sum} {things} and lost {b}. How many {things} does {name} still have?"),
    (
        "a",
        "There are {sum} {things} in a box and {name} takes {b} out. "
        "How many {things} are still in the box?",
    ),
    (
        "product",
        "{name} has {a} bags with {b} {things} in each. How many {things} does {name} have in all?",
    ),
    (
        "product",
        "{name} buys {b} {things} a day for {a} days. How many {things} does {name} buy in all?",
    ),
    (
        "product",
        "There are {a} shelves with {b} {things} on each, and {name} counts all the {things}. "
        "How many {things} are there?",
    ),
    (
        "b",
        "{name} puts {product} {things} into {a} equal boxes. How many {things} are in each box?",
    ),
    (
        "b",
        "{name} shares {product} {things} equally among {a} friends. "
        "How many {things} does each friend get?",
    ),
    (
        "b",
        "{name} has {product} {things} and packs {a} in each bag. How many bags does {name} fill?",
    ),
)


def generate(section: sections.Task, split: Split, seed: int) -> Iterator[Prompt]:
    """All problems of a part in a seeded order. Raises BadInputError for impossible operands."""
    largest = section.largest_operand or _DEFAULT_LARGEST
    if not 2 <= largest <= _LARGEST:
        raise BadInputError(
            f"task.largest_operand={largest}, expected 2 to {_LARGEST}: set one of these"
        )
    cases = _cases(largest)
    for index in _permutation(len(cases) * len(_NAMES) * len(_THINGS), seed):
        prompt = _problem(index, cases)
        if part_of(problem_key(prompt)) == split:
            yield prompt


def _cases(largest: int) -> list[tuple[int, int, int]]:
    """Every (wording, a, b)."""
    pairs = [(a, b) for a in range(2, largest + 1) for b in range(2, largest + 1)]
    differences = [(a, b) for a in range(1, largest) for b in range(1, largest - a + 1)]
    return [
        (wording, a, b)
        for wording, (answer, _) in enumerate(_WORDINGS)
        for a, b in (differences if answer == "a" else pairs)
    ]


def _permutation(size: int, seed: int) -> Iterator[int]:
    """0 to size - 1 in a random order, made lazily: Fisher and Yates, keeping only what moved."""
    generator = random.Random(seed)
    moved: dict[int, int] = {}
    for position in range(size):
        other = generator.randrange(position, size)
        yield moved.get(other, other)
        moved[other] = moved.pop(position, position)


def _problem(index: int, cases: list[tuple[int, int, int]]) -> Prompt:
    index, name = divmod(index, len(_NAMES))
    index, thing = divmod(index, len(_THINGS))
    wording, a, b = cases[index]
    numbers = {"a": a, "b": b, "sum": a + b, "product": a * b}
    answer, template = _WORDINGS[wording]
    question = template.format(name=_NAMES[name], things=_THINGS[thing], **numbers)
    return Prompt(
        prompt_id=digest_problem(question, None),
        question=question,
        kind="number",
        gold=str(numbers[answer]),
    )


TASK = Task(
    name="word_problems",
    kind="number",
    columns=("question", "answer"),
    read=gsm8k.read,  # the schema of a user's own file of problems
    generate=generate,
)
