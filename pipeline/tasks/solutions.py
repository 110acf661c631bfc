"""Worked solutions of miniature problems, each in one of several voices, with slips if wanted."""

from collections.abc import Callable
from random import Random

from pipeline.tasks.miniature import Count, Puzzle

# What someone takes a number and its change to come to; the right one is `add`.
Sum = Callable[[int, int], int]

# {a} is the number before, {b} the change without its sign, {c} the number after.
_VOICES = (
    ("{a} + {b} = {c}.", "{a} - {b} = {c}."),
    ("Adding {b} to {a} gives {c}.", "Taking {b} from {a} leaves {c}."),
    ("With {b} more, {a} becomes {c}.", "With {b} less, {a} becomes {c}."),
    ("{a} and {b} make {c} together.", "{a} without {b} is only {c}."),
)
_CLOSINGS = ("The answer is {}.", "So it is {}.", "Hence {} is right.", "This makes {}.")


def add(number: int, change: int) -> int:
    """The right sum."""
    return number + change


def solve(puzzle: Puzzle, random: Random, total: Sum = add) -> str:
    r"""A text that works the problem out and ends in \boxed{}, right where `total` is."""
    voice, closing = random.choice(_VOICES), random.choice(_CLOSINGS)
    sentences, totals = [], []
    for name, count in zip(puzzle.names, puzzle.counts, strict=True):
        worked, result = _work_out(count, voice, total)
        whose = f"{worked[:-1]} for {name}." if puzzle.kind == "choice" else f"{name}: {worked}"
        sentences.append(whose)
        totals.append(result)
    if puzzle.kind == "number":
        answer = str(totals[0])
    elif puzzle.kind == "choice":
        answer = puzzle.names[totals.index(max(totals))]
        sentences.append(f"The most is {max(totals)} for {answer}.")
    else:
        first, second = totals
        word = "more" if first > second else "less"
        sentences.append(f"{first} is {word} than {second}.")
        answer = "yes" if first > second else "no"
    return " ".join([*sentences, closing.format(f"\\boxed{{{answer}}}")])


def _work_out(count: Count, voice: tuple[str, str], total: Sum) -> tuple[str, int]:
    number, lines = count.start, []
    for change in count.changes:
        result = total(number, change)
        lines.append(voice[change < 0].format(a=number, b=abs(change), c=result))
        number = result
    return " ".join(lines), number
