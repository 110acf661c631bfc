r"""The Reason-then-Answer message: the same words for teacher, student, training and evaluation.

A zero-shot request to reason first and to end with the answer in `\boxed{}` (arXiv:2509.25100).
"""

from collections.abc import Mapping

from cluster.sections import Model, Teacher
from pipeline.rows import Kind, Prompt


def user_message(prompt: Prompt) -> str:
    """What the user says to any model that is to solve `prompt`."""
    return instruct(prompt.question, prompt.kind, prompt.choices)


def worked_examples(section: Model, kind: Kind) -> tuple[tuple[str, str], ...]:
    """The examples that a model is shown, as (user message, answer): the teacher's, if any."""
    shots = section.few_shot if isinstance(section, Teacher) else ()
    return tuple((instruct(shot.question, kind), shot.answer) for shot in shots)


def instruct(question: str, kind: Kind, choices: Mapping[str, str] | None = None) -> str:
    """The question, its options one a line, a blank line, and the instruction of its kind.

    An open question stands alone: nothing is to be boxed.
    """
    if kind == "open":
        return question
    options = [f"{label}. {text}" for label, text in (choices or {}).items()]
    wanted = _wanted(kind, choices)
    instruction = f"Reason step by step, then give {wanted} in \\boxed{{}}."
    return "\n".join([question, *options, "", instruction])


def _wanted(kind: Kind, choices: Mapping[str, str] | None) -> str:
    if kind == "number":
        return "the final answer"
    if kind == "boolean":
        return "the final answer, yes or no,"
    numbered = bool(choices) and all(label.isdigit() for label in choices or ())
    return f"the {'number' if numbered else 'letter'} of the right option"
