"""Accuracy of one model id at an OpenAI-style URL: greedy, one answer a prompt."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from cluster.errors import BadInputError, RunError
from evals.statistics import proportion_standard_error, wilson_interval
from pipeline.answers import extract_answer
from pipeline.rows import Prompt, Verdict
from pipeline.tasks import user_message
from pipeline.verdicts.exact import Grader, exact_verdict, grade_exactly

_TRIES_AGAIN = 5


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt. Written beside the result, read by the report."""

    prompt_id: str
    text: str
    answer: str | None  # canonical, None where the text has none
    verdict: Verdict | None  # None on error, and of an open prompt until all answers are there
    finish_reason: str | None
    error: str | None


ANSWER_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("verdict", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Asking:
    """How an endpoint is asked."""

    url: str  # ends with /v1
    model: str
    max_tokens: int
    concurrency: int = 32
    timeout_s: float = 600.0


def answers_table(answers: Sequence[Answer]) -> pa.Table:
    """Answers as a table of ANSWER_SCHEMA."""
    return pa.Table.from_pylist([asdict(answer) for answer in answers], schema=ANSWER_SCHEMA)


def ask_all(
    asking: Asking, prompts: Sequence[Prompt], on_answer: Callable[[Answer], None]
) -> list[Answer]:
    """The model's greedy answers, in the order of `prompts`; `on_answer` hears of each at once.

    The client library retries what may pass; a request that fails in the end is an answer with its
    error. The API key is OPENAI_API_KEY of the environment. Raises BadInputError where the key is
    refused, or the model is not there.
    """
    return asyncio.run(_ask_all(asking, prompts, on_answer))


async def _ask_all(
    asking: Asking, prompts: Sequence[Prompt], on_answer: Callable[[Answer], None]
) -> list[Answer]:
    import openai

    key = os.environ.get("OPENAI_API_KEY", "none")
    places = asyncio.Semaphore(asking.concurrency)

    async def one(prompt: Prompt) -> Answer:
        async with places:
            answer = await _ask(client, asking, prompt)
        on_answer(answer)
        return answer

    async with openai.AsyncOpenAI(
        base_url=asking.url, api_key=key, max_retries=_TRIES_AGAIN, timeout=asking.timeout_s
    ) as client:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt)) for prompt in prompts]
        except* BadInputError as group_error:
            raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


async def _ask(client: Any, asking: Asking, prompt: Prompt) -> Answer:
    import openai

    try:
        response = await client.chat.completions.create(
            model=asking.model,
            messages=[{"role": "user", "content": user_message(prompt)}],
            max_tokens=asking.max_tokens,
            temperature=0,
        )
    except (openai.NotFoundError, openai.AuthenticationError, openai.PermissionDeniedError) as no:
        raise BadInputError(
            f"{asking.url} refuses to answer as {asking.model!r}: {no}. Give the id of a model "
            "that it serves, and its key in OPENAI_API_KEY"
        ) from None
    except openai.APIError as error:
        return Answer(prompt.prompt_id, "", None, None, None, f"{type(error).__name__}: {error}")
    choice = response.choices[0]
    return _answer(prompt, choice.message.content or "", choice.finish_reason)


def _answer(prompt: Prompt, text: str, finish_reason: str | None) -> Answer:
    return Answer(
        prompt_id=prompt.prompt_id,
        text=text,
        answer=extract_answer(text, prompt.kind, prompt.choices),
        verdict=None if prompt.kind == "open" else exact_verdict(prompt, text),
        finish_reason=finish_reason,
        error=None,
    )


def _graded(answers: list[Answer], prompts: Sequence[Prompt], grader: Grader) -> list[Answer]:
    """The answers, those to open prompts with the verdicts of `grader`."""
    waiting = [
        (place, prompt)
        for place, prompt in enumerate(prompts)
        if answers[place].verdict is None and answers[place].error is None
    ]
    if not waiting:
        return answers
    verdicts = grader([(prompt, answers[place].text) for place, prompt in waiting])
    graded = list(answers)
    for (place, _), verdict in zip(waiting, verdicts, strict=True):
        graded[place] = replace(answers[place], verdict=verdict)
    return graded


def measure_accuracy(
    asking: Asking,
    prompts: Sequence[Prompt],
    *,
    task: str,
    split: str,
    grader: Grader = grade_exactly,
    max_error_share: float = 0.01,
    on_answer: Callable[[Answer], None] = lambda _: None,
) -> tuple[dict[str, Any], list[Answer]]:
    """Ask every prompt, grade, and describe: the result's record, and the answers behind it.

    `grader` is asked about open prompts alone, and must know right from wrong there. Raises
    BadInputError without prompts, RunError past `max_error_share`.
    """
    if not prompts:
        raise BadInputError(
            f"no {split} prompts of {task}: an evaluation needs at least one; give more data"
        )
    start = time.monotonic()
    answers = ask_all(asking, prompts, on_answer)
    _check_errors(asking, answers, max_error_share)
    answers = _graded(answers, prompts, grader)
    result = {
        "task": task,
        "split": split,
        "model": asking.model,
        "url": asking.url,
        "max_tokens": asking.max_tokens,
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe(answers),
    }
    return result, answers


def _check_errors(asking: Asking, answers: Sequence[Answer], max_error_share: float) -> None:
    errors = [answer.error for answer in answers if answer.error is not None]
    if len(errors) == len(answers) or len(errors) > max_error_share * len(answers):
        raise RunError(
            f"{len(errors)} of {len(answers)} requests to {asking.model} at {asking.url} failed, "
            f"more than the allowed {max_error_share:.1%}; the first: {errors[0]}"
        )


def describe(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts and shares over the answers that came; failed requests are counted apart.

    An unparsed answer is wrong, its share reported. `accuracy_given_parsed` is None where no
    answer was parsed. `interval_95` is Wilson's.
    """
    verdicts = [answer.verdict for answer in answers if answer.error is None]
    n, right = len(verdicts), verdicts.count("right")
    parsed = n - verdicts.count("unparsed")
    cut = sum(answer.finish_reason == "length" for answer in answers)
    return {
        "n": n,
        "right": right,
        "accuracy": right / n,
        "standard_error": proportion_standard_error(right, n),
        "interval_95": list(wilson_interval(right, n)),
        "unparsed": (n - parsed) / n,
        "accuracy_given_parsed": right / parsed if parsed else None,
        "cut": cut / n,
        "errors": len(answers) - n,
    }
