"""What stands before the endpoint: a key, a limit of the body, a limit of requests at once."""

import hmac
import secrets
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Self

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.endpoint_key import endpoint_key
from cluster.sections import Serving
from serving.errors import error_response

_MIB = 1 << 20
_RETRY_AFTER_S = 1


@dataclass(frozen=True)
class KeyDigest:
    """All that the ingress knows of the key, since what is deployed lies about in the cluster."""

    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, key: str) -> Self:
        """The digest of a key, under a salt that is new each time."""
        salt = secrets.token_bytes(blake2b.MAX_KEY_SIZE)
        return cls(salt, _digest(key.encode(), salt))

    def matches(self, key: bytes) -> bool:
        """Whether `key` is the one, in a time that tells nothing about it."""
        return hmac.compare_digest(_digest(key, self.salt), self.digest)


def _digest(key: bytes, salt: bytes) -> bytes:
    return blake2b(key, key=salt).digest()


@dataclass(frozen=True)
class Protection:
    """How an endpoint is guarded."""

    key: KeyDigest | None  # None asks for no key
    max_body_bytes: int
    max_concurrency: int


def protection_of(serving: Serving) -> Protection:
    """The protection that the configuration and this process's environment ask for."""
    key = endpoint_key()
    return Protection(
        KeyDigest.of(key) if key else None,
        int(serving.max_body_mib * _MIB),
        serving.max_concurrency,
    )


def protect(app: FastAPI, protection: Protection) -> None:
    """Put the guards before all routes of `app`, in the order key, requests at once, body."""
    app.add_middleware(BodyLimit, most=protection.max_body_bytes)  # the last one added is the first
    app.add_middleware(ConcurrencyLimit, most=protection.max_concurrency)
    if protection.key:
        app.add_middleware(KeyCheck, key=protection.key)


class KeyCheck:
    """Answers 401 without `Authorization: Bearer KEY`; takes the key away from what lies behind."""

    def __init__(self, app: ASGIApp, key: KeyDigest) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request with the key pass."""
        if scope["type"] == "http":
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if not self._opens(given):
                await _unauthorized(bool(given))(scope, receive, send)
                return
            kept = [header for header in scope["headers"] if header[0] != b"authorization"]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)

    def _opens(self, given: list[bytes]) -> bool:
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and self._key.matches(key.strip())


def _unauthorized(given: bool) -> ASGIApp:
    what = "the API key is not the endpoint's" if given else "this endpoint asks for an API key"
    message = f"{what}: send it as Authorization: Bearer KEY"
    return error_response(401, message, headers={"WWW-Authenticate": 'Bearer realm="potstill"'})


class ConcurrencyLimit:
    """Answers 429 where as many POSTs as allowed are under way; one that streams is to its end."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most, self._under_way = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass while there is a place, and hold the place until it is answered."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif self._under_way >= self._most:
            message = f"{self._most} requests are under way, and more are not taken: try again soon"
            refusal = error_response(429, message, headers={"Retry-After": str(_RETRY_AFTER_S)})
            await refusal(scope, receive, send)
        else:
            self._under_way += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._under_way -= 1


class BodyLimit:
    """Answers 413 for a larger body: by the length that is announced, or as soon as it is there.

    The body is read here, since what lies behind would make a 400 of an error while it reads.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request with a small enough body pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = None if _announced(scope) > self._most else await self._read(receive)
        if body is None:
            message = f"the body is larger than the {self._most} bytes that are taken: shorten it"
            await error_response(413, message)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> list[Message] | None:
        """The body as one message, or None for one that is too large; a caller may also leave."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return [message]
            body += message.get("body", b"")
            if len(body) > self._most:
                return None
            if not message.get("more_body", False):
                return [{"type": "http.request", "body": bytes(body), "more_body": False}]


def _announced(scope: Scope) -> int:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return max((int(value) for value in lengths if value.isdigit()), default=0)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return messages.pop(0) if messages else await receive()

    return replayed
