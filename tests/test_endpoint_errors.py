import pytest
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from starlette.testclient import TestClient

from serving.errors import answer_errors_as_openai


class Body(BaseModel):
    model: str


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    answer_errors_as_openai(app)

    @app.post("/v1/chat/completions")
    def chat(body: Body) -> str:
        raise HTTPException(404, f"no model {body.model}")

    return TestClient(app, raise_server_exceptions=False)


def test_a_refusal_is_in_openais_form(client):
    answer = client.post("/v1/chat/completions", json={"model": "nobody"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "no model nobody",
        "type": "not_found_error",
        "param": None,
        "code": 404,
    }


def test_an_unknown_route_is_in_openais_form(client):
    answer = client.get("/v2/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


@pytest.mark.parametrize(
    ("body", "headers", "blamed"),
    [
        (b'{"model": "student"}', {}, None),
        (b'{"model": "student"}', {"Content-Type": "text/plain"}, None),
        (b"not json", {"Content-Type": "application/json"}, None),
        (b'{"model": 3}', {"Content-Type": "application/json"}, "model"),
    ],
    ids=["no content type", "a web page's type", "no JSON", "wrong type"],
)
def test_a_malformed_body_is_the_callers_mistake(client, body, headers, blamed):
    answer = client.post("/v1/chat/completions", content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == blamed
    assert "Content-Type: application/json" in error["message"]
