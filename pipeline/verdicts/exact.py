"""Verdicts by the gold answers of a task, and the "ungraded" of open prompts without a verdict."""

from collections.abc import Callable, Sequence

from pipeline.answers import grade
from pipeline.rows import Prompt, Verdict

Answered = tuple[Prompt, str]  # a prompt, and the text of one answer to it
# All verdicts of a task are of this form: many answers at once, since some of them take a while.
Grader = Callable[[Sequence[Answered]], list[Verdict]]


def grade_exactly(answered: Sequence[Answered]) -> list[Verdict]:
    """A verdict for each answer: by the gold answer, or "ungraded" where the prompt is open."""
    return [exact_verdict(prompt, text) for prompt, text in answered]


def exact_verdict(prompt: Prompt, text: str) -> Verdict:
    """The verdict on one answer, at once."""
    if prompt.kind == "open":
        return "ungraded"
    assert prompt.gold is not None  # pipeline.tasks refuses such a row
    return grade(text, prompt.kind, prompt.gold, prompt.choices)
