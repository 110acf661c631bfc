"""What stands before the endpoint: the key, the size of a body, requests at once, other origins."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from cluster import endpoint_key, session
from cluster.config import parse_config
from cluster.errors import BadInputError
from cluster.run_folder import RunFolder
from cluster.storage import location
from serving.errors import answer_errors_as_openai
from serving.protection import KeyDigest, Protection, protect, protection_of
from serving.readiness import _ask_until
from serving.routes import refuse_many_answers
from serving.stage import serve

KEY = "planted-0f3c9a71"
CHAT = "/v1/chat/completions"
OPEN = Protection(key=None, max_body_bytes=100, max_concurrency=2)
CLOSED = Protection(KeyDigest.of(KEY), 100, 2)


def app_behind(protection, gate=None):
    """An app that answers with the size of the body; with `gate`, once that is set."""
    app = FastAPI()
    answer_errors_as_openai(app)
    seen = app.state.seen = []

    @app.get("/v1/models")
    def models():
        return []

    @app.post(CHAT)
    async def chat(request: Request):
        seen.append(dict(request.headers))
        size = len(await request.body())
        if request.headers.get("x-stream"):
            return StreamingResponse(pieces())
        if gate:
            await gate.wait()
        return size

    async def pieces():
        yield "one"
        await gate.wait()
        yield "two"

    protect(app, protection)
    return app


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def error_of(answer):
    """The error in OpenAI's form."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == answer.status_code
    return error


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(""),
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"x-api-key": KEY},
        [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEY}")],
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/")])
def test_without_the_key_there_is_no_way_in(headers, method, path):
    app = app_behind(CLOSED)
    answer = TestClient(app).request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert error_of(answer)["type"] == "authentication_error"
    assert KEY not in answer.text
    assert app.state.seen == []


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_key_there_is_and_it_goes_no_further(scheme):
    app = app_behind(CLOSED)
    answer = TestClient(app).post(CHAT, headers={"Authorization": f"{scheme} {KEY}"}, content="abc")
    assert (answer.status_code, answer.json()) == (200, 3)
    assert [set(headers) & {"authorization"} for headers in app.state.seen] == [set()]


def test_what_is_deployed_does_not_hold_the_key(monkeypatch):
    import cloudpickle

    monkeypatch.setenv("POTSTILL_API_KEY", KEY)
    protection = protection_of(config("127.0.0.1").serving)
    shipped = cloudpickle.dumps((protection, app_behind(protection).user_middleware))
    assert KEY.encode() not in shipped
    assert KEY not in repr(protection)
    arrived, _ = cloudpickle.loads(shipped)
    assert TestClient(app_behind(arrived)).get("/v1/models", headers=bearer(KEY)).is_success
    assert KeyDigest.of(KEY) != KeyDigest.of(KEY), "two digests of one key must differ"


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    digest = KeyDigest.of(KEY)
    assert digest.matches(KEY.encode())
    assert not digest.matches(b"x")
    assert {len(side) for pair in compared for side in pair} == {64}, "of digests of one length"


@pytest.mark.parametrize("protection", [OPEN, CLOSED])
def test_no_other_origin_is_let_in(protection):
    client, origin = TestClient(app_behind(protection)), {"Origin": "https://elsewhere.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
    answers = [
        client.get("/v1/models", headers=origin | bearer(KEY)),
        client.get("/v1/models", headers=origin),
        client.options(CHAT, headers=origin | asked),
    ]
    assert answers[0].status_code == 200
    assert answers[2].status_code in (401, 405)
    names = {name.lower() for answer in answers for name in answer.headers}
    assert [name for name in names if name.startswith("access-control-allow")] == []


def chunks(size):
    for _ in range(size // 10):
        yield b"0123456789"


@pytest.mark.parametrize("body", ["0123456789" * 11, chunks(110)], ids=["announced", "streamed"])
def test_a_large_body_is_refused(body):
    app = app_behind(OPEN)
    answer = TestClient(app).post(CHAT, content=body)
    assert answer.status_code == 413
    assert "100 bytes" in error_of(answer)["message"]
    assert app.state.seen == []


@pytest.mark.parametrize("body", ["0123456789" * 10, chunks(100)], ids=["announced", "streamed"])
def test_a_body_of_the_limit_passes_whole(body):
    answer = TestClient(app_behind(OPEN)).post(CHAT, content=body)
    assert (answer.status_code, answer.json()) == (200, 100)


def test_no_more_of_a_body_is_read_than_is_taken():
    given = iter(range(1000))

    async def receive():
        next(given)
        return {"type": "http.request", "body": b"0" * 10, "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    asyncio.run(app_behind(OPEN)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert next(given) == 11


def test_a_key_is_asked_for_before_a_body_is_read():
    answer = TestClient(app_behind(CLOSED)).post(CHAT, content=b"0" * 1000)
    assert answer.status_code == 401


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("headers", [{}, {"x-stream": "1"}], ids=["whole", "streaming"])
def test_requests_past_the_limit_are_told_to_try_again(headers):
    async def check():
        gate = asyncio.Event()
        app = app_behind(OPEN, gate)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            held = [asyncio.create_task(client.post(CHAT, headers=headers)) for _ in range(2)]
            await until(lambda: len(app.state.seen) == 2)
            refused = await client.post(CHAT)
            listed = await client.get("/v1/models")
            gate.set()
            done = await asyncio.gather(*held)
            after = await client.post(CHAT)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert error_of(refused)["type"] == "rate_limit_error"
        assert [answer.status_code for answer in (listed, *done, after)] == [200] * 4
        assert len(app.state.seen) == 3

    asyncio.run(asyncio.wait_for(check(), 20))


def test_a_caller_that_leaves_gives_its_place_back():
    async def check():
        app = app_behind(Protection(None, 100, 1), asyncio.Event())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for count in (1, 2):
                held = asyncio.create_task(client.post(CHAT))
                await until(lambda count=count: len(app.state.seen) == count)
                held.cancel()
                await asyncio.wait([held])

    asyncio.run(asyncio.wait_for(check(), 20))


@pytest.mark.parametrize(
    ("n", "prompt", "refused"),
    [
        (None, "text", False),
        (128, "text", False),
        (129, "text", True),
        (1, [7] * 500, False),  # one prompt as token ids
        (1, ["text"] * 128, False),
        (2, ["text"] * 65, True),
        (1, [[7, 8]] * 129, True),
    ],
)
def test_one_request_cannot_ask_for_many_answers(n, prompt, refused):
    if not refused:
        refuse_many_answers(n, prompt)
        return
    with pytest.raises(HTTPException) as error:
        refuse_many_answers(n, prompt)
    assert error.value.status_code == 400


def config(host, **sections):
    raw = {
        "run": {"folder": "runs/none"},
        "task": {"name": "word_problems"},
        "teacher": {"model": "big"},
        "student": {"model": "small"},
        "serving": {"host": host},
        **sections,
    }
    return parse_config(raw, "test")


@pytest.mark.parametrize(
    ("host", "is_open"),
    [
        ("127.0.0.1", False),
        ("127.1.2.3", False),
        ("localhost", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("::", True),
        ("", True),
        ("10.0.0.5", True),
        ("gpu-head.example", True),
    ],
)
def test_an_open_endpoint_needs_a_key(host, is_open, monkeypatch):
    monkeypatch.delenv("POTSTILL_API_KEY", raising=False)
    if is_open:
        with pytest.raises(BadInputError, match="POTSTILL_API_KEY"):
            endpoint_key.refuse_open_endpoint(host)
    else:
        endpoint_key.refuse_open_endpoint(host)
    monkeypatch.setenv("POTSTILL_API_KEY", "")
    assert endpoint_key.endpoint_key() is None
    monkeypatch.setenv("POTSTILL_API_KEY", KEY)
    endpoint_key.refuse_open_endpoint(host)


def test_no_door_to_an_open_endpoint_opens_without_a_key(monkeypatch):
    monkeypatch.delenv("POTSTILL_API_KEY", raising=False)
    with pytest.raises(BadInputError, match="POTSTILL_API_KEY"):
        serve(RunFolder(location("runs/none")), config("0.0.0.0"))
    monkeypatch.setattr("ray.serve.start", lambda **_: pytest.fail("it was opened"))
    with pytest.raises(BadInputError, match="POTSTILL_API_KEY"):
        session.start_serve(config("0.0.0.0"))


@pytest.mark.parametrize("key", ["two words", "kéy", "line\nbreak"])
def test_a_key_that_no_header_can_hold_is_refused_untold(key, monkeypatch):
    monkeypatch.setenv("POTSTILL_API_KEY", key)
    with pytest.raises(BadInputError, match="no HTTP header") as refused:
        endpoint_key.refuse_open_endpoint("127.0.0.1")
    assert key not in str(refused.value)


def test_an_evaluation_fits_the_endpoint():
    with pytest.raises(
        BadInputError, match=r"evaluation.concurrency=300 is more .*concurrency=256"
    ):
        config("127.0.0.1", evaluation={"concurrency": 300})
    config("127.0.0.1", evaluation={"concurrency": 300, "through": "engines"})


def test_the_probe_of_readiness_brings_the_key(chat_server, monkeypatch):
    import threading

    monkeypatch.setenv("POTSTILL_API_KEY", KEY)
    server = chat_server()
    _ask_until(server.url, "base", threading.Event(), [])
    assert server.keys == [f"Bearer {KEY}"]
