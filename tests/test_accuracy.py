import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.errors import BadInputError, RunError
from evals.accuracy import ANSWER_SCHEMA, Answer, Asking, answers_table, describe, measure_accuracy
from pipeline.rows import Prompt
from pipeline.tasks import user_message
from serving.client import ask

PROMPTS = [Prompt(f"p{i}", f"{i} + 1?", "number", str(i + 1)) for i in range(8)]


class FakeEndpoint(ThreadingHTTPServer):
    """Answers like an OpenAI-style endpoint; `reply` maps a request to (status, text)."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.keys = reply, [], []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": "base", "object": "model"}]})

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.requests.append(request)
            server.keys.append(self.headers["authorization"])
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        status, text = server.reply(request)
        with server.lock:
            server.under_way -= 1
        if status != 200:
            self.send(status, {"error": {"message": text}})
            return
        if request.get("stream"):
            self.break_off(text)
            return
        reason = "length" if text.endswith("...") else "stop"
        choice = {
            "index": 0,
            "finish_reason": reason,
            "message": {"role": "assistant", "content": text},
        }
        self.send(200, {"id": "1", "object": "x", "model": "m", "created": 0, "choices": [choice]})

    def break_off(self, text):
        """The first piece of a stream, and no more."""
        piece = {"choices": [{"index": 0, "delta": {"content": text}}]}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", "9999")
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())

    def send(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    servers = []

    def start(reply):
        server = FakeEndpoint(reply)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def number_of(request):
    return int(request["messages"][-1]["content"].split()[0])


def measure(server, prompts=PROMPTS, **options):
    asking = Asking(server.url, "base", max_tokens=9, concurrency=options.pop("concurrency", 4))
    return measure_accuracy(asking, prompts, task="word_problems", split="test", **options)


def test_right_wrong_unparsed_and_cut(endpoint):
    def reply(request):
        number = number_of(request)
        texts = {0: "no box...", 1: "\\boxed{99}"}
        return 200, texts.get(number, f"so \\boxed{{{number + 1}}}")

    result, answers = measure(endpoint(reply))
    assert (result["n"], result["accuracy"], result["unparsed"]) == (8, 6 / 8, 1 / 8)
    assert result["accuracy_given_parsed"] == 6 / 7
    assert (result["cut"], result["errors"]) == (1 / 8, 0)
    # sqrt(0.75 * 0.25 / 8)
    assert result["standard_error"] == pytest.approx(0.1530931, abs=1e-6)
    assert [answer.prompt_id for answer in answers] == [prompt.prompt_id for prompt in PROMPTS]
    assert [answer.verdict for answer in answers[:3]] == ["unparsed", "wrong", "right"]
    assert answers_table(answers).schema == ANSWER_SCHEMA


def test_open_answers_get_their_verdicts_once_all_are_there(endpoint):
    def grader(answered):
        assert [prompt.prompt_id for prompt, _ in answered] == ["p0", "p2", "p3"]
        return ["right" if text == "echo 2" else "unparsed" for _, text in answered]

    def reply(request):
        number = number_of(request)
        return (400, "too long") if number == 1 else (200, f"echo {number}")

    prompts = [Prompt(f"p{n}", f"{n} times", "open", None) for n in range(4)]
    seen = []
    result, answers = measure(
        endpoint(reply), prompts, grader=grader, max_error_share=0.5, on_answer=seen.append
    )
    assert [answer.verdict for answer in answers] == ["unparsed", None, "right", "unparsed"]
    assert (result["n"], result["right"], result["errors"]) == (3, 1, 1)
    assert {answer.verdict for answer in seen} == {None}


def test_asks_greedily_with_the_tasks_message(endpoint):
    server = endpoint(lambda _: (200, "\\boxed{1}"))
    measure(server, PROMPTS[:1])
    request = server.requests[0]
    assert request["messages"] == [{"role": "user", "content": user_message(PROMPTS[0])}]
    assert (request["temperature"], request["max_tokens"], request["model"]) == (0, 9, "base")


def test_client_retries_an_overloaded_endpoint(endpoint):
    refused = set()

    def reply(request):
        number = number_of(request)
        if number not in refused:
            refused.add(number)
            return 503, "busy"
        return 200, f"\\boxed{{{number + 1}}}"

    server = endpoint(reply)
    result, _ = measure(server, PROMPTS[:2])
    assert (result["accuracy"], result["errors"]) == (1.0, 0)
    assert len(server.requests) == 4


def test_failed_requests_are_counted_apart(endpoint):
    def reply(request):
        number = number_of(request)
        return (400, "too long") if number == 3 else (200, f"\\boxed{{{number + 1}}}")

    result, answers = measure(endpoint(reply), max_error_share=0.2)
    assert (result["n"], result["accuracy"], result["errors"]) == (7, 1.0, 1)
    assert "too long" in (answers[3].error or "")
    assert answers[3].verdict is None


def test_too_many_failed_requests_fail_the_evaluation(endpoint):
    def reply(request):
        return (400, "too long") if number_of(request) < 2 else (200, "\\boxed{1}")

    with pytest.raises(RunError, match=r"2 of 8 requests .* too long"):
        measure(endpoint(reply), max_error_share=0.2)


@pytest.mark.parametrize("status", [401, 404])
def test_refused_key_or_model_is_the_users_mistake(endpoint, status):
    server = endpoint(lambda _: (status, "refused"))
    with pytest.raises(BadInputError, match="refuses to answer as 'base'"):
        measure(server, concurrency=1)
    assert len(server.requests) < len(PROMPTS)


def test_an_empty_evaluation_is_an_error(endpoint):
    with pytest.raises(BadInputError, match="no test prompts"):
        measure(endpoint(lambda _: (200, "")), [])


def test_concurrency_is_used_and_kept(endpoint):
    def reply(_):
        time.sleep(0.1)
        return 200, "\\boxed{1}"

    server = endpoint(reply)
    measure(server, concurrency=3)
    assert server.most_under_way == 3


def test_key_comes_from_the_environment_alone(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = endpoint(lambda _: (200, "\\boxed{1}"))
    result, _ = measure(server, PROMPTS[:1])
    assert server.keys == ["Bearer secret"]
    assert "secret" not in json.dumps(result)


def test_accuracy_given_parsed_is_unknown_where_nothing_is_parsed():
    answers = [Answer("p", "What?", "hm", None, "unparsed", "stop", None)]
    assert describe(answers)["accuracy_given_parsed"] is None


def test_ask_names_the_models_that_are_there(endpoint):
    server = endpoint(lambda _: (404, "no such model"))
    with pytest.raises(BadInputError, match="expected one of base"):
        ask(server.url, "Hello?", "nope")


def test_ask_says_that_nothing_answers():
    with pytest.raises(BadInputError, match="potstill serve"):
        ask("http://127.0.0.1:9/v1", "Hello?")


def test_ask_says_that_an_answer_broke_off(endpoint, capsys):
    server = endpoint(lambda _: (200, "It is"))
    with pytest.raises(RunError, match=r"base at .* broke off"):
        ask(server.url, "Hello?", "base")
    assert capsys.readouterr().out == "It is"


def test_ask_passes_on_what_the_endpoint_refuses(endpoint):
    server = endpoint(lambda _: (400, "the prompt is too long"))
    with pytest.raises(RunError, match=r"base at .* cannot answer.*too long"):
        ask(server.url, "Hello?", "base")
