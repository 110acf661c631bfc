"""What a task is: where its data lies, and how one raw row of it becomes a Prompt."""

import ast
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cluster import sections
from cluster.digests import digest_text
from pipeline.answers import canonical_answer
from pipeline.rows import Kind, Prompt
from pipeline.tasks.faults import BadRowError, check_texts

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Row = Mapping[str, Any]

_ID_COLUMNS = ("id", "qid")
_SHOWN = 80  # characters of a value in an error


class Problem(NamedTuple):
    """What a task reads from a row: the gold answer is still as the data set writes it."""

    question: str
    gold: str | None = None  # only an open problem may do without
    choices: dict[str, str] | None = None
    tests: str | None = None
    any_id: bool = False  # the row's own id names something else than the problem


@dataclass(frozen=True)
class Task:
    """One data set's schema and whereabouts."""

    name: str
    kind: Kind
    read: Callable[[Row], Problem | None]  # None: a row to skip
    columns: tuple[str, ...] = ()  # that a row must have; others are ignored
    one_of: tuple[str, ...] = ()  # columns of which it must have one
    skips: str = ""  # what the skipped rows are, for the user
    hub_id: str | None = None
    hub_config: str | None = None
    hub_sizes: tuple[int, int] | None = None  # train and test prompts there, for plans offline
    # (section, split, seed) -> all its prompts in a seeded order; for a task that makes its own
    generate: Callable[[sections.Task, Split, int], Iterator[Prompt]] | None = None

    @property
    def expects(self) -> str:
        """The columns of a row, in words."""
        return ", ".join(filter(None, (*self.columns, " or ".join(self.one_of))))

    def missing(self, columns: Collection[str]) -> str:
        """The columns that are needed and not among these, in words; "" where none is."""
        missing = [column for column in self.columns if column not in columns]
        if self.one_of and not any(column in columns for column in self.one_of):
            missing.append(" or ".join(self.one_of))
        return ", ".join(missing)

    def prompt(self, raw: Row) -> Prompt | None:
        """The Prompt of a raw row; None of one that the task skips.

        Raises BadRowError where a column is missing, empty, or without a usable text or gold
        answer.
        """
        row = {str(name).strip(): value for name, value in raw.items()}
        self._check_columns(row)
        problem = self.read(row)
        if problem is None:
            return None
        own_id = None if problem.any_id else _given_id(row)
        check_texts(_texts(problem, own_id))
        return Prompt(
            prompt_id=own_id or digest_problem(problem.question, problem.choices),
            question=problem.question,
            kind=self.kind,
            gold=problem.gold if self.kind == "open" else self._gold(problem),
            choices=problem.choices,
            tests=problem.tests,
        )

    def _check_columns(self, row: Row) -> None:
        given = {name for name, value in row.items() if value is not None}
        if missing := self.missing(given):
            raise BadRowError(
                f"no {missing}",
                f"no {missing} (the row has {', '.join(row)}); {self.name} expects {self.expects}: "
                "rename the columns, or leave out rows without them",
            )

    def _gold(self, problem: Problem) -> str:
        gold = canonical_answer(problem.gold or "", self.kind, problem.choices)
        if gold is None:
            raise BadRowError(
                "no usable gold answer",
                f"the gold answer is {_short(problem.gold)}, expected {self._expected(problem)}: "
                "correct it, or leave out rows without a gold answer",
            )
        return gold

    def _expected(self, problem: Problem) -> str:
        if self.kind == "choice":
            return f"one of the labels {', '.join(problem.choices or ())}"
        return "a number" if self.kind == "number" else "yes or no"


def _texts(problem: Problem, own_id: str | None) -> dict[str, str | None]:
    options = {f"option {label}": text for label, text in (problem.choices or {}).items()}
    texts = {"id": own_id, "question": problem.question, "gold answer": problem.gold}
    return {**texts, "tests": problem.tests, **options}


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def text_of(row: Row, column: str) -> str:
    """A column that holds a text, without space around it. Raises BadRowError where it does not."""
    value = row[column]
    if not isinstance(value, str):
        raise BadRowError(
            f"a {column} that is no text", f"{column} is {_short(value)}, expected a text"
        )
    return value.strip()


def _given_id(row: Row) -> str | None:
    ids = (str(row[column]).strip() for column in _ID_COLUMNS if row.get(column) is not None)
    return next(filter(None, ids), None)


def digest_problem(question: str, choices: Mapping[str, str] | None) -> str:
    """An id for a problem whose data set gives none: of its question, labels and options."""
    return digest_text(question, *(part for item in (choices or {}).items() for part in item))


def nested(row: Row, column: str) -> dict[str, Any]:
    """A column that holds an object: as such, or written in a CSV's cell (as JSON or Python)."""
    value = row[column]
    if isinstance(value, str):
        value = parse_cell(value, column)
    if not isinstance(value, dict):
        raise BadRowError(
            f"{column} that cannot be read",
            f"{column} is {_short(value)}, expected an object, which a CSV writes as JSON in one "
            "cell",
        )
    return value


def parse_cell(text: str, column: str) -> Any:
    """The value that a CSV's cell holds as JSON or Python. Raises BadRowError where it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # Python's csv and pandas write a dict as Python would
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadRowError(
            f"{column} that cannot be read",
            f"{column} is {_short(text)}, which is no JSON object: write the column as JSON",
        ) from None


def labelled_texts(row: Row, column: str = "choices") -> dict[str, str]:
    """Options given as {"text": [...], "label": [...]}, as label -> text in the item's order."""
    value = nested(row, column)
    texts, labels = value.get("text"), value.get("label")
    if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels) > 1:
        pairs = zip(labels, texts, strict=True)
        options = {str(label).strip(): str(text).strip() for label, text in pairs}
        if len(options) == len(labels):
            return options
    raise BadRowError(
        f"{column} that cannot be read",
        f'{column} is {_short(value)}, expected {{"text": [...], "label": [...]}} of one length, '
        "with two options or more and no label twice",
    )
