"""The one client of OpenAI-style endpoints: many chat requests at once, within their limits.

The openai package sends again what may pass, and waits as long as a Retry-After asks for.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from cluster.errors import BadInputError
from pipeline.spending import Budget

_TRIES_AGAIN_UNPAID, _PATIENCE_UNPAID_S = 2, 20.0
_SERVER_ERROR = 500
_TOKENS_OF_A_TURN = 16  # more than any chat template puts around one


@dataclass(frozen=True)
class ChatEndpoint:
    """A model at an OpenAI-style URL, and how it may be asked."""

    url: str  # the base URL, mostly ending in /v1
    model: str
    key_variable: str = "OPENAI_API_KEY"  # of the environment; without it "none" is sent
    concurrency: int = 32
    requests_per_minute: float | None = None  # those that are sent again included
    timeout_s: float = 600.0
    tries_again: int = 5
    length_parameter: str = "max_tokens"  # what it calls the limit of an answer


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to go on with."""

    messages: Sequence[Mapping[str, str]]
    max_tokens: int
    parameters: Mapping[str, Any]  # such as temperature and seed

    @property
    def most_tokens(self) -> tuple[int, int]:
        """The most tokens of prompt and answer: no tokenizer's token is less than a byte."""
        prompt = sum(_TOKENS_OF_A_TURN + len(turn["content"].encode()) for turn in self.messages)
        return prompt, self.max_tokens


@dataclass(frozen=True)
class ChatReply:
    """What became of a request. Tokens are the endpoint's count; unknown, the most possible."""

    text: str
    finish_reason: str | None  # "stop", "length", or the endpoint's own; None on error
    prompt_tokens: int
    tokens: int
    error: str | None = None
    refused: bool = False  # an error of this request alone, such as one that is too long


def chat_all(
    endpoint: ChatEndpoint,
    requests: Sequence[ChatRequest],
    on_reply: Callable[[int, ChatReply], None],
    budget: Budget | None = None,
) -> None:
    """Ask every request; `on_reply` hears its position and its reply as soon as it came.

    A request that fails in the end is a reply with its error. Raises BadInputError where the key
    is refused or the model is not there, LimitReachedError where `budget` does not allow another
    request, and what `on_reply` raises. Then nothing more is sent, and `on_reply` has heard of all
    that was.
    """
    asyncio.run(_chat_all(endpoint, requests, on_reply, budget or Budget()))


async def _chat_all(
    endpoint: ChatEndpoint,
    requests: Sequence[ChatRequest],
    on_reply: Callable[[int, ChatReply], None],
    budget: Budget,
) -> None:
    pending = (pair for pair in enumerate(requests))

    async def work() -> None:
        with closing(pending):  # whichever stops on an error leaves nothing for the others
            for position, request in pending:
                most = budget.cost(*request.most_tokens)
                async with budget.room_for(most) as pay:
                    reply = await _ask(client, endpoint, request)
                    pay(reply.prompt_tokens, reply.tokens)
                on_reply(position, reply)

    async with _client(endpoint) as client:
        workers = [work() for _ in range(min(endpoint.concurrency, len(requests)))]
        ended = await asyncio.gather(*workers, return_exceptions=True)
    for error in ended:
        if error is not None:
            raise error


def _client(endpoint: ChatEndpoint) -> Any:
    import openai

    pace = endpoint.requests_per_minute
    hooks: list[Callable[..., Any]] = [_Pace(pace)] if pace else []
    return openai.AsyncOpenAI(
        base_url=endpoint.url,
        api_key=_key(endpoint),
        max_retries=endpoint.tries_again,
        timeout=endpoint.timeout_s,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": hooks}),
    )


def _key(endpoint: ChatEndpoint) -> str:
    return os.environ.get(endpoint.key_variable) or "none"


def _said(what: object, endpoint: ChatEndpoint) -> str:
    """What an endpoint said, less the key: some repeat it, and their words are kept in files."""
    return without_key(str(what), endpoint.key_variable)


def without_key(text: str, variable: str) -> str:
    """A text in which the key that `variable` holds is no more than the variable's name."""
    key = os.environ.get(variable)
    return text.replace(key, f"${variable}") if key else text


class _Pace:
    """Holds each request back until its turn, those that the client library sends again too."""

    def __init__(self, requests_per_minute: float) -> None:
        self._interval_s, self._next = 60 / requests_per_minute, 0.0

    async def __call__(self, _: Any) -> None:
        now = asyncio.get_running_loop().time()
        turn = max(self._next, now)
        self._next = turn + self._interval_s
        await asyncio.sleep(turn - now)


async def _ask(client: Any, endpoint: ChatEndpoint, request: ChatRequest) -> ChatReply:
    import openai

    try:
        response = await client.chat.completions.create(
            model=endpoint.model,
            messages=list(request.messages),
            **{endpoint.length_parameter: request.max_tokens},
            **request.parameters,
        )
    except (openai.NotFoundError, openai.AuthenticationError, openai.PermissionDeniedError) as no:
        raise BadInputError(
            f"{endpoint.url} refuses to answer as {endpoint.model!r}: {_said(no, endpoint)}. Give "
            f"the id of a model that it serves, and its key in {endpoint.key_variable}"
        ) from None
    except openai.APIError as error:
        refused = isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError)
        said = f"{type(error).__name__}: {_said(error, endpoint)}"
        return ChatReply("", None, 0, 0, said, refused)
    if not getattr(response, "choices", None):  # some send their errors with status 200
        said = _said(response, endpoint)[:200]
        return ChatReply("", None, 0, 0, f"no answer in the response: {said}")
    choice, usage = response.choices[0], response.usage
    tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else request.most_tokens
    return ChatReply(choice.message.content or "", choice.finish_reason, *tokens)


def check_endpoint(endpoint: ChatEndpoint) -> None:
    """See that the endpoint is there, takes the key and has the model, by a request that is free.

    Raises BadInputError where it is not so. One that lists no models is taken at its word.
    """
    import openai

    client = openai.OpenAI(
        base_url=endpoint.url,
        api_key=_key(endpoint),
        max_retries=_TRIES_AGAIN_UNPAID,
        timeout=_PATIENCE_UNPAID_S,
    )
    try:
        with client:
            listed = _listed(client.get("/models", cast_to=object))
    except openai.APIConnectionError as error:
        raise BadInputError(
            f"nothing answers at {endpoint.url} ({_said(error, endpoint)}): check the URL, and "
            "that this machine may reach it"
        ) from None
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise BadInputError(
            f"{endpoint.url} refuses the key: {_said(error, endpoint)}. Put a valid one into the "
            f"environment variable {endpoint.key_variable}"
        ) from None
    except openai.APIStatusError as error:
        if error.status_code >= _SERVER_ERROR:
            said = _said(error, endpoint)
            raise BadInputError(f"{endpoint.url} is out of order: {said}. Try later") from None
        return
    if listed and not listed & {endpoint.model, endpoint.model.partition(":")[0]}:
        raise BadInputError(
            f"{endpoint.url} has no model {endpoint.model!r}, only {', '.join(sorted(listed)[:20])}"
            f"{' and others' if len(listed) > 20 else ''}: give one of these"
        )


def _listed(answer: Any) -> set[str]:
    """Ids of a list of models; none where the answer has another form."""
    models = answer.get("data") if isinstance(answer, dict) else answer
    rows = models if isinstance(models, list) else []
    ids = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
    return {*ids, *(name.removeprefix("models/") for name in ids)}  # Gemini's carry that prefix
