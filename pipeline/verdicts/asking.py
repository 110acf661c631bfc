"""Asks a judge behind an OpenAI-style endpoint, and stores what it says as it comes."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.errors import BadInputError, RunError
from cluster.progress import progress, say
from cluster.sections import JudgeVerdict
from pipeline.rows import Sample
from pipeline.store import SampleStore

_STORED_TOGETHER = 4  # rounds of `concurrency` replies
_TRIES_AGAIN = 5
_CHECK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Question:
    """One message to a judge."""

    key: str  # of the reply in the store
    prompt_id: str  # of the answer that it is about
    message: str


def ask_all(
    section: JudgeVerdict, judge: str, questions: Sequence[Question], store: SampleStore
) -> None:
    """Ask, and store the replies in batches as samples of the model digest `judge`.

    A question that the endpoint refuses to take gets no reply. Raises BadInputError where the key
    or the model is refused, RunError where nothing answers; what was said before is stored.
    """
    client = _client(section, _TRIES_AGAIN, section.request_timeout_s)
    ask = partial(_ask, client, section, judge)
    together, refused = _STORED_TOGETHER * section.concurrency, 0
    with (
        ThreadPoolExecutor(section.concurrency) as pool,
        progress(f"asking {section.model}", len(questions)) as bar,
    ):
        for start in range(0, len(questions), together):
            batch = [pool.submit(ask, one) for one in questions[start : start + together]]
            wait(batch)
            refused += _store(batch, store)
            bar.advance(len(batch))
    if refused:
        say(f"{section.model} refused {refused} of {len(questions)} answers, which are unparsed")


def _store(batch: "Sequence[Future[Sample | None]]", store: SampleStore) -> int:
    """Store the replies, only then raise what any of them failed with; the count of refusals."""
    replies = [future.result() for future in batch if future.exception() is None]
    store.write(reply for reply in replies if reply is not None)
    for future in batch:
        future.result()
    return replies.count(None)


def _ask(client: Any, section: JudgeVerdict, judge: str, question: Question) -> Sample | None:
    import openai

    where = f"the judge {section.model} at {section.url}"
    try:
        response = _send(client, section, question.message)
    except (openai.NotFoundError, openai.AuthenticationError, openai.PermissionDeniedError) as no:
        raise BadInputError(
            f"{where} refuses to answer: {no}. Give a model that it serves, and its key in "
            f"{section.api_key_env}, on every node of the cluster"
        ) from None
    except (openai.BadRequestError, openai.UnprocessableEntityError):
        return None
    except openai.APIError as error:
        raise RunError(
            f"{where} does not answer ({type(error).__name__}: {error}); what it said is kept, so "
            "run again when it does"
        ) from None
    choice, usage = response.choices[0], response.usage
    return Sample(
        key=question.key,
        prompt_id=question.prompt_id,
        sample_index=0,
        model=judge,
        text=choice.message.content or "",
        finish_reason=choice.finish_reason,
        tokens=usage.completion_tokens if usage else 0,
    )


def ask_once(section: JudgeVerdict, message: str) -> tuple[str, str | None]:
    """The reply to one message, and its finish reason: a check that the judge is there.

    Raises BadInputError where it is not, within a minute.
    """
    import openai

    where = f"task.verdict by judge: {section.model} at {section.url}"
    client = _client(section, 1, min(section.request_timeout_s, _CHECK_TIMEOUT_S))
    try:
        choice = _send(client, section, message).choices[0]
    except openai.APIConnectionError as error:
        raise BadInputError(
            f"{where} does not answer ({error}): start it, or correct task.verdict.url"
        ) from None
    except openai.APIError as error:
        raise BadInputError(
            f"{where} refuses to answer: {error}. Give a model that it serves, and its key in "
            f"{section.api_key_env}"
        ) from None
    return choice.message.content or "", choice.finish_reason


def _client(section: JudgeVerdict, tries_again: int, timeout_s: float) -> Any:
    import openai

    key = os.environ.get(section.api_key_env, "none")
    return openai.OpenAI(
        base_url=section.url, api_key=key, max_retries=tries_again, timeout=timeout_s
    )


def _send(client: Any, section: JudgeVerdict, message: str) -> Any:
    return client.chat.completions.create(
        model=section.model,
        messages=[{"role": "user", "content": message}],
        max_tokens=section.max_new_tokens,
        temperature=0,
    )
