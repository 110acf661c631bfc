"""Accuracy of one model id at an OpenAI-style URL: greedy, one answer a prompt."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from cluster.errors import BadInputError, RunError
from evals.statistics import proportion_standard_error, wilson_interval
from pipeline.answers import extract_answer
from pipeline.chat import conversation
from pipeline.endpoint import ChatEndpoint, ChatReply, ChatRequest, chat_all
from pipeline.rows import Prompt, Verdict
from pipeline.tasks import user_message
from pipeline.verdicts.exact import Grader, exact_verdict, grade_exactly


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt. Written beside the result, read by the report."""

    prompt_id: str
    message: str  # what the model was asked
    text: str
    answer: str | None  # canonical, None where the text has none
    verdict: Verdict | None  # None on error, and of an open prompt until all answers are there
    finish_reason: str | None
    error: str | None


ANSWER_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
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
    key_variable: str = "OPENAI_API_KEY"  # of the environment


Ask = Callable[[Asking, Sequence[Prompt], Callable[[Answer], None]], list[Answer]]


def answers_table(answers: Sequence[Answer]) -> pa.Table:
    """Answers as a table of ANSWER_SCHEMA."""
    return pa.Table.from_pylist([asdict(answer) for answer in answers], schema=ANSWER_SCHEMA)


def ask_all(
    asking: Asking, prompts: Sequence[Prompt], on_answer: Callable[[Answer], None]
) -> list[Answer]:
    """The model's greedy answers, in the order of `prompts`; `on_answer` hears of each at once.

    The client library retries what may pass; a request that fails in the end is an answer with its
    error. Raises BadInputError where the key is refused, or the model is not there.
    """
    answers: dict[int, Answer] = {}

    def on_reply(position: int, reply: ChatReply) -> None:
        prompt = prompts[position]
        answers[position] = graded(prompt, reply.text, reply.finish_reason, reply.error)
        on_answer(answers[position])

    endpoint = ChatEndpoint(
        asking.url,
        asking.model,
        key_variable=asking.key_variable,
        concurrency=asking.concurrency,
        timeout_s=asking.timeout_s,
    )
    requests = [
        ChatRequest(conversation(user_message(prompt)), asking.max_tokens, {"temperature": 0})
        for prompt in prompts
    ]
    chat_all(endpoint, requests, on_reply)
    return [answers[position] for position in range(len(prompts))]


def graded(
    prompt: Prompt, text: str, finish_reason: str | None, error: str | None = None
) -> Answer:
    """The answer that a text is to a prompt, or that an error is."""
    if error is not None:
        return Answer(prompt.prompt_id, user_message(prompt), "", None, None, None, error)
    return Answer(
        prompt_id=prompt.prompt_id,
        message=user_message(prompt),
        text=text,
        answer=extract_answer(text, prompt.kind, prompt.choices),
        verdict=None if prompt.kind == "open" else exact_verdict(prompt, text),
        finish_reason=finish_reason,
        error=None,
    )


def with_verdicts(answers: list[Answer], prompts: Sequence[Prompt], grader: Grader) -> list[Answer]:
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
    ask: Ask = ask_all,
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
    answers = ask(asking, prompts, on_answer)
    _check_errors(asking, answers, max_error_share)
    answers = with_verdicts(answers, prompts, grader)
    facts = {"model": asking.model, "url": asking.url, "max_tokens": asking.max_tokens}
    return result_of_answers(prompts, answers, task, split, start) | facts, answers


def result_of_answers(
    prompts: Sequence[Prompt], answers: Sequence[Answer], task: str, split: str, start: float
) -> dict[str, Any]:
    """The record of an evaluation that began at `start` (time.monotonic), without its model.

    Where the prompts are of several kinds, "by_kind" has the figures of each.
    """
    result: dict[str, Any] = {
        "task": task,
        "split": split,
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe(answers),
    }
    kinds = {prompt.prompt_id: prompt.kind for prompt in prompts}
    if len(set(kinds.values())) > 1:
        result["by_kind"] = {
            kind: describe([answer for answer in answers if kinds[answer.prompt_id] == kind])
            for kind in sorted(set(kinds.values()))
        }
    return result


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
