"""What the sections of teachers and judges may not say together."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from cluster.sections import Endpoint, JudgeVerdict, Model, Teacher

# Capitals, so that a key that is put here by mistake is seen as one and not written to files.
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_OF_ENGINES = ("chat_template", "dtype", "trust_remote_code")


def option_of(name: str) -> str:
    """The section of a teacher in the configuration, by the name of its traces."""
    number = name.removeprefix("teacher_")
    return f"further_teachers[{int(number) - 2}]" if number.isdigit() else name


def impossible_teachers(teachers: Mapping[str, Teacher]) -> list[str]:
    """What cannot work in the sections of these teachers, a sentence each."""
    problems = []
    seen: dict[Any, str] = {}
    for name, teacher in teachers.items():
        first = seen.setdefault(_what_writes(teacher), name)
        if first != name:
            problems.append(
                f"{option_of(name)} writes the very traces of {option_of(first)}: give it another "
                "model or other worked examples, or remove it"
            )
        if teacher.endpoint:
            problems += _impossible_endpoint(f"{option_of(name)}.endpoint", teacher.endpoint)
            problems += _ignored_options(option_of(name), teacher)
    return problems


def _what_writes(teacher: Teacher) -> Any:
    place = teacher.endpoint and teacher.endpoint.url
    manner = teacher.few_shot, teacher.stop, teacher.chat_template, teacher.dtype
    return teacher.model, place, manner


def _ignored_options(name: str, teacher: Teacher) -> list[str]:
    changed = [
        option
        for option in _OF_ENGINES
        if getattr(teacher, option) != Model.model_fields[option].default
    ]
    return [
        f"{name}.{option} is for a model on this cluster's engines, and {name} has an endpoint: "
        "remove one of the two"
        for option in changed
    ]


def _impossible_endpoint(name: str, endpoint: Endpoint) -> list[str]:
    money = (
        endpoint.price_per_million_input_tokens,
        endpoint.price_per_million_output_tokens,
        endpoint.spending_limit,
    )
    rules = [
        (
            None in money and any(value is not None for value in money),
            f"{name} must have both prices and spending_limit, or none of the three: without "
            "prices no limit can be kept, and without a limit spending has no end. Set "
            "price_per_million_input_tokens, price_per_million_output_tokens and spending_limit",
        ),
        (
            None not in money and not (money[0] or money[1]),
            f"{name}.spending_limit is never reached at prices of 0: set a price, or remove the "
            "limit and the prices",
        ),
    ]
    secrets = _misplaced_secrets(name, endpoint.url, endpoint.api_key_env)
    return secrets + [message for broken, message in rules if broken]


def impossible_judge(judge: JudgeVerdict) -> list[str]:
    """What cannot work in the section of a judge, a sentence each."""
    return _misplaced_secrets("task.verdict", judge.url, judge.api_key_env)


def _misplaced_secrets(name: str, url: str, variable: str) -> list[str]:
    rules = [
        (
            not is_base_url(url),
            f"{name}.url must be a base URL such as https://api.example.com/v1, without user, "
            "password or query: a key is read from the environment, never from the configuration",
        ),
        (
            not _VARIABLE.fullmatch(variable),
            f"{name}.api_key_env must be the NAME of an environment variable in capitals, such as "
            "OPENAI_API_KEY; if you gave the key itself, put it into that variable",
        ),
    ]
    return [message for broken, message in rules if broken]


def is_base_url(url: str) -> bool:
    """Whether a client can take `url` for the base of an API: no password, query or odd port."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # a bracket that is not closed, a port that is no number or too large
        return False
    plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and plain
