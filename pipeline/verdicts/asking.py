"""Asks a judge behind an OpenAI-style endpoint, and stores what it says as it comes."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import BadInputError, RunError
from cluster.progress import progress, say
from cluster.sections import JudgeVerdict
from pipeline.endpoint import ChatEndpoint, ChatReply, ChatRequest, chat_all
from pipeline.rows import Sample
from pipeline.store import SampleStore

_STORED_TOGETHER = 4  # rounds of `concurrency` replies
_CHECK_TRIES_AGAIN, _CHECK_TIMEOUT_S = 1, 60.0


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
    said: list[Sample] = []
    refused = 0

    def on_reply(position: int, reply: ChatReply) -> None:
        nonlocal refused
        bar.advance()
        if reply.refused:
            refused += 1
            return
        if reply.error is not None:
            raise RunError(
                f"the judge {section.model} at {section.url} does not answer ({reply.error}); what "
                "it said is kept, so run again when it does"
            )
        said.append(_sample(judge, questions[position], reply))
        if len(said) >= _STORED_TOGETHER * section.concurrency:
            store_said()

    def store_said() -> None:
        store.write(said)
        said.clear()

    with progress(f"asking {section.model}", len(questions)) as bar:
        try:
            requests = [_request(section, question.message) for question in questions]
            chat_all(_endpoint(section), requests, on_reply)
        finally:
            store_said()
    if refused:
        say(f"{section.model} refused {refused} of {len(questions)} answers, which are unparsed")


def _sample(judge: str, question: Question, reply: ChatReply) -> Sample:
    return Sample(
        key=question.key,
        prompt_id=question.prompt_id,
        sample_index=0,
        model=judge,
        text=reply.text,
        finish_reason=reply.finish_reason,
        tokens=reply.tokens,
    )


def ask_once(section: JudgeVerdict, message: str) -> tuple[str, str | None]:
    """The reply to one message, and its finish reason: a check that the judge is there.

    Raises BadInputError where it is not, within two minutes.
    """
    timeout_s = min(section.request_timeout_s, _CHECK_TIMEOUT_S)
    endpoint = _endpoint(section, _CHECK_TRIES_AGAIN, timeout_s)
    replies: list[ChatReply] = []
    chat_all(endpoint, [_request(section, message)], lambda _, reply: replies.append(reply))
    (reply,) = replies
    if reply.error is not None:
        raise BadInputError(
            f"task.verdict by judge: {section.model} at {section.url} does not answer "
            f"({reply.error}): start it, or correct task.verdict"
        )
    return reply.text, reply.finish_reason


def _request(section: JudgeVerdict, message: str) -> ChatRequest:
    messages = [{"role": "user", "content": message}]
    return ChatRequest(messages, section.max_new_tokens, {"temperature": 0})


def _endpoint(
    section: JudgeVerdict, tries_again: int = 5, timeout_s: float | None = None
) -> ChatEndpoint:
    return ChatEndpoint(
        section.url,
        section.model,
        key_variable=section.api_key_env,
        concurrency=section.concurrency,
        timeout_s=timeout_s or section.request_timeout_s,
        tries_again=tries_again,
    )
