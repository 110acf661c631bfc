"""A teacher that others serve: its samples come from an endpoint, within limits, into the store."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.config import RunConfig
from cluster.digests import digest_text
from cluster.errors import RunError
from cluster.progress import progress
from cluster.sections import Endpoint, Teacher
from cluster.teachers import option_of
from pipeline.account import Account, PaidBatch
from pipeline.chat import conversation
from pipeline.endpoint import ChatEndpoint, ChatReply, ChatRequest, chat_all
from pipeline.missing import check_error_share, sample_key, sample_missing
from pipeline.rows import Kind, Prompt, Sample, Wanted
from pipeline.spending import LimitReachedError
from pipeline.store import SampleStore
from pipeline.tasks import user_message, worked_examples

_TRIES_AGAIN = 10  # about a minute, where the endpoint does not say how long


@dataclass(frozen=True)
class ForeignWriter:
    """A teacher behind an endpoint, with its manner of being asked."""

    name: str  # of its traces: "teacher", "teacher_2"
    model: str  # its id at the endpoint
    endpoint: Endpoint
    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    few_shot: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """What stands for the weights, which nobody here has seen: the place and the model's id."""
        place = urlsplit(self.endpoint.url)
        return digest_text("endpoint", place.netloc + place.path.rstrip("/"), self.model)

    def messages(self, prompt: Prompt) -> list[dict[str, str]]:
        """The conversation in which the teacher answers a prompt."""
        return conversation(user_message(prompt), self.few_shot)


@dataclass(frozen=True)
class ForeignRequest(Wanted):
    """One sample to ask an endpoint for."""

    messages: list[dict[str, str]]
    seed: int


def foreign_writer(name: str, teacher: Teacher, config: RunConfig, kind: Kind) -> ForeignWriter:
    """The writer of a teacher's traces. `teacher` has an endpoint."""
    sampling = config.sampling
    return _writer(
        name, teacher, kind, sampling.temperature, sampling.top_p, sampling.max_new_tokens
    )


def foreign_solver(name: str, teacher: Teacher, config: RunConfig, kind: Kind) -> ForeignWriter:
    """The same teacher as it is evaluated: greedy."""
    return _writer(name, teacher, kind, 0.0, 1.0, config.evaluation_tokens)


def _writer(
    name: str, teacher: Teacher, kind: Kind, temperature: float, top_p: float, max_new_tokens: int
) -> ForeignWriter:
    assert teacher.endpoint is not None
    return ForeignWriter(
        name=name,
        model=teacher.model,
        endpoint=teacher.endpoint,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        stop=teacher.stop,
        few_shot=worked_examples(teacher, kind),
    )


def plan_foreign_requests(
    writer: ForeignWriter, prompts: Sequence[Prompt], samples: int, seed: int
) -> list[ForeignRequest]:
    """All samples that a stage wants, `samples` a prompt, each with its key and its own seed."""
    manner = repr(
        (writer.digest, writer.temperature, writer.top_p, writer.max_new_tokens, writer.stop)
    )
    requests = []
    for prompt in prompts:
        messages = writer.messages(prompt)
        rendered = digest_text(manner, repr(messages))
        for index in range(samples):
            key, own_seed = sample_key(rendered, index, seed)
            requests.append(ForeignRequest(key, prompt.prompt_id, index, messages, own_seed))
    return requests


def sample_foreign(
    writer: ForeignWriter,
    prompts: Sequence[Prompt],
    samples: int,
    config: RunConfig,
    store: SampleStore,
) -> list[Sample]:
    """`samples` of each prompt: those of the store, and new ones of the endpoint for the rest.

    Raises BadInputError where the endpoint refuses the key or the model, RunError past
    sampling.max_error_share and at the spending limit. What was paid for is kept then.
    """
    requests = plan_foreign_requests(writer, prompts, samples, config.run.seed)

    def draw(missing: list[ForeignRequest]) -> list[Sample]:
        return _draw(writer, missing, config, store, len(requests))

    return sample_missing(
        writer.name, writer.digest, requests, draw, store, config.sampling.max_error_share
    )


def _draw(
    writer: ForeignWriter,
    requests: Sequence[ForeignRequest],
    config: RunConfig,
    store: SampleStore,
    total: int,
) -> list[Sample]:
    """Ask for the samples; those that come are stored at once, those that fail are returned."""
    account = account_of(writer, config, store)
    budget, batch = account.open_budget(), PaidBatch(account)
    errors: list[Sample] = []

    def on_reply(position: int, reply: ChatReply) -> None:
        row = _row(requests[position], writer.digest, reply)
        if row.error is None:
            batch.add(row, reply.prompt_tokens)
        else:
            errors.append(row)
        bar.advance(1, **({"spent": budget.spent} if budget.spent else {}))
        # Every further request might cost something, so a hopeless stage ends here.
        check_error_share(writer.name, errors, total, config.sampling.max_error_share)

    chats = [_chat(writer, request) for request in requests]
    try:
        with progress(f"asking {writer.name}", len(requests)) as bar:
            chat_all(chat_endpoint(writer.model, writer.endpoint), chats, on_reply, budget)
    except LimitReachedError as reached:
        left = len(requests) - batch.rows - len(errors)
        most = left * max(budget.cost(*chat.most_tokens) for chat in chats)
        raise RunError(
            f"{writer.name} stops here: {reached}, and the next request might cost more than is "
            f"left. {left} of {total} samples are left, for at most {most:.4g}. What was paid for "
            f"is kept: raise {option_of(writer.name)}.endpoint.spending_limit, and the same "
            "command goes on"
        ) from None
    finally:
        batch.write()
    return errors


def _row(request: ForeignRequest, model: str, reply: ChatReply) -> Sample:
    return Sample(
        key=request.key,
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        model=model,
        text=reply.text,
        finish_reason=reply.finish_reason,
        tokens=reply.tokens,
        error=reply.error,
    )


def _chat(writer: ForeignWriter, request: ForeignRequest) -> ChatRequest:
    parameters: dict[str, Any] = {
        "temperature": writer.temperature,
        "top_p": writer.top_p,
        "seed": request.seed,
    }
    if writer.stop:
        parameters["stop"] = list(writer.stop)
    return ChatRequest(request.messages, writer.max_new_tokens, parameters)


def chat_endpoint(model: str, endpoint: Endpoint) -> ChatEndpoint:
    """The client's view of a section of the configuration."""
    return ChatEndpoint(
        url=endpoint.url,
        model=model,
        key_variable=endpoint.api_key_env,
        concurrency=endpoint.concurrency,
        requests_per_minute=endpoint.requests_per_minute,
        timeout_s=endpoint.request_timeout_s,
        tries_again=_TRIES_AGAIN,
        length_parameter=endpoint.length_parameter,
    )


def account_of(writer: ForeignWriter, config: RunConfig, store: SampleStore) -> Account:
    """What the run has paid this teacher."""
    return Account(store, writer.digest, config.run.folder, writer.name, writer.endpoint)


def endpoint_keys(config: RunConfig) -> dict[str, str]:
    """The keys of the teachers' endpoints, by the environment variable that each is in here."""
    endpoints = [teacher.endpoint for teacher in config.teachers.values()]
    names = {endpoint.api_key_env for endpoint in endpoints if endpoint}
    return {name: os.environ[name] for name in names if name in os.environ}
