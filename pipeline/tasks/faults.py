"""Rows that cannot be used while others can: what is wrong with them, counted and limited."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.errors import BadInputError

_LONGEST_TEXT = 1_000_000  # characters; what models read at once is less, and to cut it takes long
# Controls that stand for no space, and halves of characters that UTF-8 has no bytes for.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


class BadRowError(BadInputError):
    """A fault of one row: the data can be used without it."""

    def __init__(self, reason: str, message: str) -> None:
        """`reason` is what rows with this fault have in common: "an empty question"."""
        super().__init__(message)
        self.reason = reason


def check_texts(texts: Mapping[str, str | None]) -> None:
    """Raise BadRowError where a row's question is empty, or a text too long or not to be read.

    `texts` are all of a row, by their names.
    """
    if not texts["question"]:
        raise BadRowError("an empty question", "the question is empty: leave the row out")
    for name, text in texts.items():
        if text is not None:
            _check_text(name, text)


def _check_text(name: str, text: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise BadRowError(
            "a text that is too long",
            f"the {name} has {len(text)} characters, expected at most {_LONGEST_TEXT}: shorten it",
        )
    if found := _CONTROL.search(text):
        raise BadRowError(
            "control characters",
            f"the {name} has the control character U+{ord(found[0]):04X} as its character "
            f"{found.start() + 1}: remove it, or read the file anew in its own encoding",
        )


@dataclass
class Faults:
    """The rows of one part of the data that were left out for a fault of theirs."""

    first: list[str] = field(default_factory=list)  # the first row of each reason, and its fault
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """How many were left out."""
        return self.reasons.total()

    def add(self, where: str, error: BadRowError) -> None:
        """Count a row; `where` it stands."""
        if error.reason not in self.reasons:
            self.first.append(f"{where}: {error}")
        self.reasons[error.reason] += 1

    def check(self, what: str, rows: int, max_error_share: float) -> None:
        """Raise BadInputError where they are too large a share of `rows`; `what` names the part."""
        if self.rows <= max_error_share * rows:
            return
        raise BadInputError(
            f"{what}: {self.rows} of {rows} rows cannot be used, more than "
            f"task.max_error_share={max_error_share:g} allows: {self}. Correct them or leave them "
            "out of the file, or raise task.max_error_share"
        )

    def __str__(self) -> str:
        """Reasons with their counts, and the first row of each: one line."""
        counts = ", ".join(f"{count} with {reason}" for reason, count in self.reasons.items())
        return f"{counts} (first: {'; '.join(self.first)})"
