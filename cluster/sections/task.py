"""The problems to distil on, and who says what is right."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cluster.sections.base import (
    Execution,
    Place,
    Section,
    Share,
    Template,
)


class FunctionVerdict(Section):
    """Answers to open prompts are right or wrong by a Python function."""

    by: Literal["function"]
    function: str
    """Where it is: "package.module:name" or "path/to/file.py:name". It takes an answer's text and a
    dict of the prompt (question, gold, tests), and returns True, False, or None for unparsed."""


class UnitTestsVerdict(Section):
    """Answers to open prompts are right where the Python code in them passes their row's tests.

    The code runs in a sandbox, a process of its own without network, other processes, environment
    or files to write but in an empty folder; docs/tasks.md has what it does and does not hold.
    """

    by: Literal["unit_tests"]
    time_limit_s: PositiveFloat = 5
    """CPU seconds of one answer and its tests; at three times as many of the clock it ends too."""
    memory_limit_mib: PositiveInt = 512
    """Address space of one answer and its tests."""
    concurrency: Execution[PositiveInt | None] = None
    """Answers tested at once; null means one for each core."""


class JudgeVerdict(Section):
    """Answers to open prompts are right or wrong by what a model says, asked greedily."""

    by: Literal["judge"]
    url: Execution[str]
    """The judge's OpenAI-style endpoint, such as http://127.0.0.1:8001/v1."""
    model: str
    """The model to ask for there."""
    api_key_env: Execution[str] = "OPENAI_API_KEY"
    """The environment variable that holds the key; an endpoint without keys needs none."""
    template: Template | None = None
    """A Jinja text, or the path of one, with question, gold (none or a reference) and answer, that
    asks for "Verdict: right" or "Verdict: wrong"; null takes Potstill's own."""
    max_new_tokens: PositiveInt = 1024
    """Tokens of the judge's reply."""
    concurrency: Execution[PositiveInt] = 16
    """Requests under way at once."""
    request_timeout_s: Execution[PositiveFloat] = 600
    """How long one request may take before the client library tries again."""


AnyVerdict = FunctionVerdict | UnitTestsVerdict | JudgeVerdict


class Task(Section):
    """The problems to distil on, with known answers or a verdict on open ones."""

    name: str
    """A task of pipeline/tasks, such as word_problems or gsm8k."""
    data: Place | None = None
    """A Hugging Face id, or a JSONL, JSON, CSV or Parquet file or folder; null: the task's own."""
    max_error_share: Execution[Share] = 0.01
    """Rows that cannot be used are left out and counted; more than this share of a part is refused,
    before the run starts."""
    train_prompts: PositiveInt | None = None
    """How many prompts to distil on; null takes all."""
    validation_prompts: PositiveInt | None = None
    """How many validation prompts to choose the best epoch on; null takes all."""
    test_prompts: PositiveInt | None = None
    """How many test prompts to report on; null takes all."""
    largest_operand: PositiveInt | None = None
    """The difficulty of word_problems; null means 9. Other tasks refuse it."""
    verdict: Annotated[AnyVerdict, Field(discriminator="by")] | None = None
    """What makes an answer to an open prompt (task chat) right; null leaves answers ungraded."""
