"""Chat: single-turn prompts of any kind, answered in free text.

A row holds a `prompt` or `question`, or a dialogue in the manner of ShareGPT, of which the first
turn of the human is the prompt (daDPO, arXiv:2506.15717). Answers have no verdict unless the
configuration chooses one (`task.verdict`), which may look at the optional columns `gold`, a
reference answer, and `tests`, Python code.
"""

import json
from typing import Any

from pipeline.tasks.faults import BadRowError
from pipeline.tasks.task import Problem, Row, Task, parse_cell, text_of

_HUMAN = ("human", "user")


def read(row: Row) -> Problem | None:
    """The prompt of a row; None of a dialogue that does not start with words of a human."""
    for column in ("prompt", "question"):
        if row.get(column) is not None:
            return _problem(row, column)
    words = _first_words(row)
    # The id of such a row is that of its dialogue, which others open with the same words.
    return Problem(words, any_id=True) if words else None


def _problem(row: Row, column: str) -> Problem:
    return Problem(text_of(row, column), _text(row, "gold"), tests=_text(row, "tests"))


def _text(row: Row, column: str) -> str | None:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _first_words(row: Row) -> str:
    """What a human says first; nothing where somebody else begins."""
    turns: Any = row["conversations"]
    if isinstance(turns, str):
        turns = parse_cell(turns, "conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError(
            "conversations that cannot be read",
            f'conversations is {str(turns)[:80]!r}, expected turns such as {{"from": "human", '
            '"value": "..."}',
        )
    if not turns or turns[0].get("from") not in _HUMAN:
        return ""
    return str(turns[0].get("value") or "").strip()


TASK = Task(
    name="chat",
    kind="open",
    one_of=("prompt", "question", "conversations"),
    read=read,
    skips="dialogues that do not start with words of a human",
    hub_id="Aeala/ShareGPT_Vicuna_unfiltered",
)
