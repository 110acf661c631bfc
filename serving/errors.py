"""Errors of the endpoint in the form that OpenAI's clients read: {"error": {"message": ...}}."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as a response; `param` is the field of the request that is to blame."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def answer_errors_as_openai(app: FastAPI) -> None:
    """Let `app` answer refusals in OpenAI's form.

    FastAPI's own has `detail` alone, and ray.serve.llm's repeats the offending input, which for a
    body without a Content-Type is bytes, so that the answer itself fails.
    """

    async def refused(_: Request, error: Any) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    async def malformed(_: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str))
        where = f" at {field}" if field else ""
        message = f"the body is not a valid request{where}: {first['msg']}; send JSON"
        return error_response(400, f"{message} with Content-Type: application/json", field or None)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, malformed)
