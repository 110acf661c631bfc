"""Small problems of three kinds, made by the project itself, for models of a million parameters.

number: what one child has after two or three changes. choice: which of four boxes holds the most.
boolean: whether one child has more than another. All three need the same sums, one at a time, so
that one slip is mostly a wrong answer. Guessing is right on one choice in four and on every second
boolean. Each distinct problem belongs to one part by its digest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from random import Random

from cluster import sections
from cluster.errors import BadInputError
from pipeline.rows import Kind, Prompt
from pipeline.tasks.splits import part_of, problem_key
from pipeline.tasks.task import Problem, Row, Split, Task, digest_problem

KINDS: tuple[Kind, ...] = ("number", "choice", "boolean")
LABELS = "ABCD"
NAMES = ("Ana", "Ben", "Eva", "Leo", "Mia", "Omar", "Tom", "Zoe")
THINGS = ("books", "cards", "coins", "pens", "shells", "stamps")

_SUPPLY = 8_000  # problems of each kind, over all parts
_LARGEST_START = 20
_LARGEST_CHANGE = 9
_MORE = ("gets {} more", "finds {}", "buys {}")
_LESS = ("loses {}", "gives away {}", "sells {}")


@dataclass(frozen=True)
class Count:
    """A number of things, and what is added to it (above 0) or taken from it (below) in turn."""

    start: int
    changes: tuple[int, ...]

    @property
    def totals(self) -> list[int]:
        """What is there at first and after each change."""
        return list(accumulate(self.changes, initial=self.start))


@dataclass(frozen=True)
class Puzzle:
    """A problem before it is put in words."""

    kind: Kind
    thing: str
    names: tuple[str, ...]  # whose the counts are: children's, or the labels of boxes
    counts: tuple[Count, ...]

    @property
    def gold(self) -> str:
        """The right answer, canonical."""
        totals = [count.totals[-1] for count in self.counts]
        if self.kind == "number":
            return str(totals[0])
        if self.kind == "choice":
            return self.names[totals.index(max(totals))]
        return "yes" if totals[0] > totals[1] else "no"


def draw_puzzle(kind: Kind, random: Random) -> Puzzle:
    """A random problem; totals that are compared are all different."""
    thing, children = random.choice(THINGS), random.sample(NAMES, 2)
    if kind == "number":
        count = _draw_count(random.choice((2, 3)), random)
        return Puzzle(kind, thing, tuple(children[:1]), (count,))
    names = tuple(LABELS if kind == "choice" else children)
    counts: dict[int, Count] = {}
    while len(counts) < len(names):
        count = _draw_count(1, random)
        counts.setdefault(count.totals[-1], count)
    return Puzzle(kind, thing, names, tuple(counts.values()))


def _draw_count(changes: int, random: Random) -> Count:
    total = start = random.randint(2, _LARGEST_START)
    drawn: list[int] = []
    while len(drawn) < changes:
        change = random.randint(2, _LARGEST_CHANGE) * random.choice((1, -1))
        if total + change > 0:
            drawn.append(change)
            total += change
    return Count(start, tuple(drawn))


def put_in_words(puzzle: Puzzle, random: Random) -> Prompt:
    """The problem as a task states it."""
    choices = None
    if puzzle.kind == "choice":
        question = f"Which box holds the most {puzzle.thing}?"
        choices = dict(zip(puzzle.names, map(_box, puzzle.counts), strict=True))
    else:
        told = [
            _story(name, count, puzzle.thing, random)
            for name, count in zip(puzzle.names, puzzle.counts, strict=True)
        ]
        question = " ".join([*told, _question(puzzle)])
    return Prompt(
        prompt_id=digest_problem(question, choices),
        question=question,
        kind=puzzle.kind,
        gold=puzzle.gold,
        choices=choices,
    )


def _box(count: Count) -> str:
    (change,) = count.changes
    return f"{count.start} and {change} more" if change > 0 else f"{count.start} less {-change}"


def _story(name: str, count: Count, thing: str, random: Random) -> str:
    events = [
        random.choice(_MORE if change > 0 else _LESS).format(abs(change))
        for change in count.changes
    ]
    listed = ", ".join([f"{name} has {count.start} {thing}", *events[:-1]])
    return f"{listed} and {events[-1]}."


def _question(puzzle: Puzzle) -> str:
    first, *others = puzzle.names
    if not others:
        return f"How many {puzzle.thing} does {first} have now?"
    return f"Does {first} have more {puzzle.thing} than {others[0]} now?"


def generate(_section: sections.Task, split: Split, seed: int) -> Iterator[Prompt]:
    """All problems of a part in a seeded order, in which the three kinds take turns."""
    turns = zip(*(_part(kind, split, seed) for kind in KINDS), strict=False)
    return chain.from_iterable(turns)


def _part(kind: Kind, split: Split, seed: int) -> Iterator[Prompt]:
    order = list(range(_SUPPLY))
    Random(f"{kind} {seed}").shuffle(order)
    seen: set[str] = set()
    for index in order:
        random = Random(f"{kind} problem {index}")
        prompt = put_in_words(draw_puzzle(kind, random), random)
        key = problem_key(prompt)
        if key not in seen and part_of(key) == split:
            seen.add(key)
            yield prompt


def _refuse(_row: Row) -> Problem:
    raise BadInputError(
        "miniature makes its problems itself: leave task.data out, or take another task"
    )


TASK = Task(name="miniature", kind="number", columns=(), read=_refuse, generate=generate)
