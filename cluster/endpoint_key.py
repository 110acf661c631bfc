"""The key that Potstill's own endpoint asks for: read from the environment, written nowhere."""

import os
import re
from ipaddress import ip_address

from cluster.errors import BadInputError

KEY_VARIABLE = "POTSTILL_API_KEY"
_OF_OTHERS = "OPENAI_API_KEY"
_SENDABLE = re.compile(r"[!-~]+")  # what a header may hold


def endpoint_key() -> str | None:
    """The key in POTSTILL_API_KEY, or None. Raises BadInputError for one that cannot be sent."""
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return None
    if not _SENDABLE.fullmatch(key):
        raise BadInputError(
            f"the key in {KEY_VARIABLE} has characters that no HTTP header may hold: give one of "
            "ASCII letters, digits and signs without blanks, such as `openssl rand -hex 32` prints"
        )
    return key


def key_variable() -> str:
    """The variable with the key for an endpoint that may be Potstill's or another's."""
    return KEY_VARIABLE if os.environ.get(KEY_VARIABLE) else _OF_OTHERS


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_open_endpoint(host: str) -> None:
    """Raise BadInputError where others would reach the endpoint and no key is asked of them."""
    if endpoint_key() is None and not is_loopback(host):
        raise BadInputError(
            f"serving.host={host} lets other machines reach the endpoint, which asks no key of "
            f"them: put one into the environment variable {KEY_VARIABLE} (`export "
            f"{KEY_VARIABLE}=$(openssl rand -hex 32)`), or set serving.host to 127.0.0.1"
        )
