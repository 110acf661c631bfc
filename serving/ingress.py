"""The Ray Serve ingress: the OpenAI routes of ray.serve.llm, with Potstill's model ids.

Imported only where an endpoint starts: ray.serve.llm pulls vLLM in.
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request

# Ray's own example of an ingress also reaches into these private modules.
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    OpenAIHTTPException,
)
from ray.llm._internal.serve.core.ingress.middleware import (
    SetRequestIdMiddleware,
    add_exception_handling_middleware,
)
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from serving.errors import answer_errors_as_openai
from serving.protection import Protection, protect
from serving.routes import (
    Route,
    refuse_many_answers,
    renamed,
    stop_ids,
    stop_strings,
    with_few_shot,
)

_ENDPOINTS = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
}


class Ingress(OpenAiIngress):
    """Several model ids on few engines: rewrites the id, adds few-shot turns and stop strings."""

    def __init__(self, *, routes: Mapping[str, Route], **options: Any) -> None:
        super().__init__(**options)
        self._routes = dict(routes)

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        refuse_many_answers(body.n)
        route = self._route(body.model)
        messages: list[Any] = body.messages
        body.messages = with_few_shot(messages, route.few_shot)
        body.stop = stop_strings(body.stop, route)
        body.stop_token_ids = stop_ids(body.stop_token_ids, route)
        asked, body.model = body.model, route.engine
        with _refusals():
            answer = await super().chat(body, request)
        return _rename(answer, route.engine, asked)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a raw text; a chat's worked examples have no place in it."""
        refuse_many_answers(body.n, body.prompt)
        route = self._route(body.model)
        body.stop = stop_strings(body.stop, route)
        asked, body.model = body.model, route.engine
        with _refusals():
            answer = await super().completions(body, request)
        return _rename(answer, route.engine, asked)

    def _route(self, model: str | None) -> Route:
        """Raise HTTPException where no such model is served: 404, or 400 without an id."""
        route = self._routes.get(model or "")
        if route is None:
            what = f"no model {model!r} is served" if model else "the request names no model"
            expected = ", ".join(self._routes)
            raise HTTPException(404 if model else 400, f"{what}: expected one of {expected}")
        return route


@contextmanager
def _refusals() -> Iterator[None]:
    """What an engine refuses, in its words alone; ray.serve.llm tells its own classes beside."""
    try:
        yield
    except OpenAIHTTPException as error:
        raise HTTPException(error.status_code, error.message) from None


def _rename(response: Response, engine: str, asked: str | None) -> Response:
    if asked is None or asked == engine:
        return response
    if isinstance(response, StreamingResponse):
        response.body_iterator = _rename_stream(response.body_iterator, engine, asked)
        return response
    text = renamed(bytes(response.body).decode(), engine, asked)
    return Response(text, status_code=response.status_code, media_type="application/json")


async def _rename_stream(pieces: AsyncIterable[Any], engine: str, asked: str) -> AsyncIterator[str]:
    async for piece in pieces:
        text = piece if isinstance(piece, str) else bytes(piece).decode()
        yield renamed(text, engine, asked)


def ingress_class(protection: Protection) -> type:
    """The ingress with its routes behind `protection`, on an app without ray.serve.llm's CORS.

    The default app lets every web page call it with the visitor's credentials, and FastAPI's pages
    of documentation load scripts from elsewhere.
    """
    app = FastAPI(title="Potstill", docs_url=None, redoc_url=None)
    add_exception_handling_middleware(app)
    answer_errors_as_openai(app)
    app.add_middleware(SetRequestIdMiddleware)
    protect(app, protection)
    return make_fastapi_ingress(Ingress, endpoint_map=_ENDPOINTS, app=app)
