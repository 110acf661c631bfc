"""What the ingress does to a request: whose engine answers, and what goes before its messages."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

Message = Any  # a mapping with role and content, as the openai package types it
_MOST_ANSWERS = 128  # of one request, which counts as one whatever it asks for


@dataclass(frozen=True)
class Route:
    """How requests for one model id are served."""

    engine: str  # the model id under which the engine itself runs
    few_shot: tuple[tuple[str, str], ...] = ()  # (user message, answer) turns before the caller's
    stop: tuple[str, ...] = ()  # used where the caller gives none
    stop_token_ids: tuple[int, ...] = ()  # the chat template's end of turn


def with_few_shot(
    messages: Sequence[Message], few_shot: Sequence[tuple[str, str]]
) -> list[Message]:
    """The caller's messages after the worked examples; leading system messages stay in front."""
    leading = 0
    while leading < len(messages) and messages[leading].get("role") == "system":
        leading += 1
    examples: list[Message] = []
    for question, answer in few_shot:
        examples.append({"role": "user", "content": question})
        examples.append({"role": "assistant", "content": answer})
    return [*messages[:leading], *examples, *messages[leading:]]


def refuse_many_answers(n: int | None, prompt: Any = "") -> None:
    """Raise HTTPException (400) where a request asks for more than 128 answers.

    `prompt` is a text or a list of token ids, or a list of either.
    """
    several = isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt)
    answers = (n or 1) * (len(prompt) if several else 1)
    if answers > _MOST_ANSWERS:
        raise HTTPException(
            400,
            f"{answers} answers asked for in one request, and at most {_MOST_ANSWERS} are given",
        )


def stop_strings(asked: str | list[str] | None, route: Route) -> str | list[str] | None:
    """The caller's stop strings, or else the model's own."""
    return asked or list(route.stop) or None


def stop_ids(asked: Sequence[int] | None, route: Route) -> list[int]:
    """The caller's stop tokens and the end of turn, where an answer of any sampler ends too."""
    return [*(asked or ()), *route.stop_token_ids]


def renamed(text: str, engine: str, asked: str) -> str:
    """A JSON response, or a piece of a stream of them, with the model named as the caller did.

    Quotes inside a JSON string are escaped, so the pattern meets only the field itself.
    """
    field = re.compile(r'(?<!\\)"model":\s*' + re.escape(json.dumps(engine)))
    return field.sub(lambda _: f'"model": {json.dumps(asked)}', text)
