"""The rows that pass between stages, each a frozen dataclass beside its Parquet schema."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import pyarrow as pa

from cluster.errors import BadInputError

Kind = Literal["number", "choice", "boolean", "open"]
# Of an open prompt whose task has no verdict, every answer is "ungraded".
Verdict = Literal["right", "wrong", "unparsed", "ungraded"]


@dataclass(frozen=True)
class Prompt:
    """A problem, with its known answer if it has one. Made by pipeline/tasks, read ever after."""

    prompt_id: str
    question: str
    kind: Kind
    gold: str | None  # canonical: "18", "3/4", "B", "yes"; of an open prompt a reference, or None
    choices: dict[str, str] | None = None  # label -> text, in the item's own order
    tests: str | None = None  # Python code that a right answer to an open prompt passes


@dataclass(frozen=True)
class Wanted:
    """A sample that a stage wants. What is asked of a model extends it."""

    key: str
    prompt_id: str
    sample_index: int


@dataclass(frozen=True)
class Sample:
    """One answer of one model to one prompt. Written to the store by pipeline/sampling."""

    key: str
    prompt_id: str
    sample_index: int
    model: str  # digest of the model that wrote it
    text: str
    finish_reason: str | None  # "stop", "length" (cut, gets no end-of-turn token), None on error
    tokens: int
    error: str | None = None


@dataclass(frozen=True)
class Trace:
    """A graded sample. Written to a run's completions/ by pipeline/grading, read by pairs."""

    key: str
    prompt_id: str
    sample_index: int
    model: str
    epoch: int  # of the student that wrote it: 0 is the base student, and the teacher
    text: str
    finish_reason: str | None
    tokens: int
    error: str | None
    answer: str | None
    verdict: Verdict
    kept: bool  # False for an error, and for a near-duplicate of an earlier trace of its side


@dataclass(frozen=True)
class Pair:
    """What one training example is made of. Written to pairs/epoch_NNN, read by training."""

    prompt_id: str
    prompt: str  # the user's message, without a chat template and without few-shot examples
    chosen: str
    rejected: str | None  # None: only the NLL of `chosen` applies
    chosen_model: str
    chosen_epoch: int
    rejected_model: str | None
    rejected_epoch: int | None
    rejected_fallback: bool  # the latest pool was empty, so the negative came from the base student
    chosen_finished: bool  # False: cut by the length limit
    rejected_finished: bool | None


@dataclass(frozen=True)
class Score:
    """How likely a model finds a response to a prompt. Written to the store by pipeline/scoring."""

    key: str
    model: str  # digest of the model that was asked
    logp: float  # log-probability of the whole response, in nats
    tokens: int  # that the sum is over, an end-of-turn token included


@dataclass(frozen=True)
class Anchor:
    """A response's score under a model that does not train. Written to scores/ by the resampler."""

    reader: str  # "reference" or "teacher"
    text: str  # key of the message and the response, pipeline.scoring.Answered.key
    model: str  # digest of the reader
    logp: float  # nats
    tokens: int


SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string()),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
TRACE_SCHEMA = pa.schema(
    [
        *(
            field
            for field in SAMPLE_SCHEMA
            if field.name in ("key", "prompt_id", "sample_index", "model")
        ),
        pa.field("epoch", pa.int32(), nullable=False),
        *(
            field
            for field in SAMPLE_SCHEMA
            if field.name in ("text", "finish_reason", "tokens", "error")
        ),
        pa.field("answer", pa.string()),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
    ]
)
PAIR_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string()),
        pa.field("chosen_model", pa.string(), nullable=False),
        pa.field("chosen_epoch", pa.int32(), nullable=False),
        pa.field("rejected_model", pa.string()),
        pa.field("rejected_epoch", pa.int32()),
        pa.field("rejected_fallback", pa.bool_(), nullable=False),
        pa.field("chosen_finished", pa.bool_(), nullable=False),
        pa.field("rejected_finished", pa.bool_()),
    ]
)
SCORE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)
ANCHOR_SCHEMA = pa.schema(
    [
        pa.field("reader", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)
SCHEMAS: dict[type, pa.Schema] = {
    Sample: SAMPLE_SCHEMA,
    Trace: TRACE_SCHEMA,
    Pair: PAIR_SCHEMA,
    Score: SCORE_SCHEMA,
    Anchor: ANCHOR_SCHEMA,
}

Row = TypeVar("Row", Sample, Trace, Pair, Score, Anchor)


def to_table(row_type: type[Row], rows: Iterable[Row]) -> pa.Table:
    """Rows of one type as a table of that type's schema."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMAS[row_type])


def from_table(row_type: type[Row], table: pa.Table) -> list[Row]:
    """A table's rows, after a check that it has `row_type`'s columns.

    Raises ValueError where columns are missing, more, or of another type.
    """
    expected = SCHEMAS[row_type]
    if not table.schema.equals(expected):
        raise ValueError(
            f"expected the columns of {row_type.__name__}, {expected.names}; "
            f"got {table.schema.names}"
        )
    return [row_type(**row) for row in table.to_pylist()]


def parse_kind(text: str | None) -> Kind | None:
    """A kind by its name. Raises BadInputError for any other text."""
    kinds: dict[str | None, Kind | None] = {
        None: None,
        "number": "number",
        "choice": "choice",
        "boolean": "boolean",
        "open": "open",
    }
    if text not in kinds:
        raise BadInputError(f"kind={text!r}: expected number, choice, boolean or open")
    return kinds[text]
