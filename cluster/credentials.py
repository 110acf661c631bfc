"""URLs with a password or a token in them: they would end in a run's files, so they are refused."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cluster.errors import BadInputError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
_SECRET = re.compile(r"key|token|secret|passw|pwd|cred|auth|sig", re.IGNORECASE)


def holds_credentials(text: str) -> bool:
    """Whether `text` is a URL with a password, a user of a web address, or a token as parameter.

    A user alone is no secret elsewhere: Azure's URLs name the container in that place.
    """
    if not _URL.fullmatch(text):
        return False
    try:
        parts = urlsplit(text)
    except ValueError:
        return False  # no URL at all, which others refuse
    user, at, _ = parts.netloc.rpartition("@")
    in_user = bool(at) and (":" in user or parts.scheme in ("http", "https"))
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    return in_user or any(_SECRET.search(name) for name, _ in parameters)


def refuse_credentials(name: str, text: str) -> None:
    """Raise BadInputError, without repeating it, where the URL that `name` gives holds a secret."""
    if holds_credentials(text):
        raise BadInputError(_refusal(name))


def misplaced_credentials(options: Any, name: str = "") -> list[str]:
    """What is wrong with the URLs in nested options, a sentence for each that holds a secret."""
    return [_refusal(where) for where, text in _texts(options, name) if holds_credentials(text)]


def _refusal(name: str) -> str:
    return (
        f"{name} is a URL with a user, a password or a token in it: give it without; credentials "
        "come from the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from "
        "the role of the machine"
    )


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _texts(part, f"{name}[{place}]")
