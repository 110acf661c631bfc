"""Verdicts by a judge, asked over HTTP at a server of the test's own."""

import threading
from collections.abc import Callable

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cluster.errors import BadInputError, RunError
from cluster.sections import JudgeVerdict, Task
from cluster.storage import location
from pipeline.rows import Prompt
from pipeline.store import SampleStore
from pipeline.verdicts.choice import check_verdict
from pipeline.verdicts.judge import judge_grader, read_verdict

PROMPTS = [Prompt(f"p{n}", f"What is {n} + 1?", "open", str(n + 1)) for n in range(6)]
FREE = Prompt("free", "Write a poem.", "open", None)


class Judge:
    """What the server was asked, and `reply`, which maps a message to (status, text)."""

    def __init__(self, url: str) -> None:
        self.url, self.requests, self.keys = url, [], []
        self.reply: Callable[[str], tuple[int, str]] = lambda _: (200, "Fine.\nVerdict: right")

    @property
    def messages(self):
        return [request["messages"][0]["content"] for request in self.requests]

    def section(self, **options) -> JudgeVerdict:
        return JudgeVerdict(**{"by": "judge", "url": self.url, "model": "sage", **options})


@pytest.fixture(scope="module")
def server(free_port):
    app, port = FastAPI(), free_port()
    holder = {}

    @app.post("/v1/chat/completions")
    async def complete(request: Request):
        judge, body = holder["judge"], await request.json()
        judge.requests.append(body)
        judge.keys.append(request.headers["authorization"])
        status, text = judge.reply(body["messages"][0]["content"])
        if status != 200:
            return JSONResponse(
                {"error": {"message": text}}, status, headers={"retry-after-ms": "1"}
            )
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {"id": "1", "object": "x", "model": "m", "created": 0, "choices": [choice]}

    uvicorn_server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    while not uvicorn_server.started:
        thread.join(0.01)
    yield holder, f"http://127.0.0.1:{port}/v1"
    uvicorn_server.should_exit = True
    thread.join()


@pytest.fixture
def judge(server):
    holder, url = server
    holder["judge"] = Judge(url)
    return holder["judge"]


@pytest.fixture
def store(tmp_path):
    return SampleStore(location(str(tmp_path / "store")))


def words_of(message: str, tag: str) -> str:
    return message.partition(f"<{tag}>\n")[2].partition(f"\n</{tag}>")[0]


def compares(message: str) -> tuple[int, str]:
    """What an honest judge says of two texts."""
    same = words_of(message, "answer") == words_of(message, "reference_answer")
    return 200, f"I compared them.\n**Verdict:** {'Right' if same else 'Wrong'}."


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("It holds.\nVerdict: right", "right"),
        ("**Verdict:** wrong.", "wrong"),
        ("## VERDICT\nRight", "right"),
        ("I first thought verdict: right, but no.\nVerdict: wrong", "wrong"),
        ("Verdict: right|wrong", "unparsed"),
        ("Verdict: right or wrong?", "unparsed"),
        ('Verdict: "right" / "wrong"', "unparsed"),
        ("Verdict: not right", "unparsed"),
        ("Verdict: rightly so", "unparsed"),
        ("The answer is right.", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_reading_a_verdict(reply, verdict):
    assert read_verdict(reply) == verdict


def test_a_judge_is_asked_greedily_with_question_reference_and_answer(judge, store):
    judge.reply = compares
    answered = [(PROMPTS[0], "1"), (PROMPTS[1], "3"), (FREE, "Roses")]
    assert judge_grader(judge.section(), store)(answered) == ["right", "wrong", "wrong"]
    first = next(text for text in judge.messages if "0 + 1" in text)
    assert words_of(first, "question") == "What is 0 + 1?"
    assert (words_of(first, "reference_answer"), words_of(first, "answer")) == ("1", "1")
    assert "reference" not in next(text for text in judge.messages if "Roses" in text)
    request = judge.requests[0]
    assert (request["temperature"], request["max_tokens"], request["model"]) == (0, 1024, "sage")


def test_an_answer_without_words_is_not_judged(judge, store):
    assert judge_grader(judge.section(), store)([(FREE, " \n"), (FREE, "Roses")]) == [
        "unparsed",
        "right",
    ]
    assert len(judge.requests) == 1


def test_nothing_is_asked_twice(judge, store):
    judge.reply = compares
    grader = judge_grader(judge.section(), store)
    answered = [(prompt, "3") for prompt in PROMPTS] * 2
    expected = ["wrong", "wrong", "right", "wrong", "wrong", "wrong"] * 2
    assert grader(answered) == expected
    assert len(judge.requests) == len(PROMPTS)
    assert judge_grader(judge.section(concurrency=1), store)(answered) == expected
    assert len(judge.requests) == len(PROMPTS)
    judge_grader(judge.section(model="oracle"), store)(answered[:2])
    judge_grader(judge.section(template="Verdict on {{ answer }}?"), store)(answered[:1])
    assert len(judge.requests) == len(PROMPTS) + 3


@pytest.mark.fault
def test_what_a_judge_said_before_it_failed_is_kept(judge, store):
    def fails_late(message: str) -> tuple[int, str]:
        return (500, "on fire") if "5 + 1" in message else compares(message)

    judge.reply = fails_late
    grader = judge_grader(judge.section(concurrency=1), store)
    answered = [(prompt, "3") for prompt in PROMPTS]
    with pytest.raises(RunError, match=r"sage at .* does not answer .*on fire.*run again"):
        grader(answered)
    judge.requests.clear()
    judge.reply = compares
    assert grader(answered).count("right") == 1
    assert [text for text in judge.messages if "5 + 1" not in text] == []


def test_an_answer_that_the_endpoint_refuses_is_unparsed(judge, store, capsys):
    judge.reply = lambda text: (400, "too long") if "0 + 1" in text else compares(text)
    answered = [(PROMPTS[0], "1"), (PROMPTS[1], "2")]
    assert judge_grader(judge.section(), store)(answered) == ["unparsed", "right"]
    assert "sage refused 1 of 2 answers" in capsys.readouterr().out


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_is_the_users_mistake(judge, store, status):
    judge.reply = lambda _: (status, "who are you?")
    with pytest.raises(
        BadInputError, match=r"refuses to answer as 'sage': .*who are you.*key in MY_KEY"
    ):
        judge_grader(judge.section(api_key_env="MY_KEY"), store)([(FREE, "Roses")])


def test_the_key_comes_from_the_environment_that_is_named(judge, store, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    judge_grader(judge.section(api_key_env="MY_KEY"), store)([(FREE, "Roses")])
    assert judge.keys == ["Bearer secret"]


def check(section: JudgeVerdict) -> None:
    check_verdict(Task(name="chat", verdict=section), PROMPTS)


def test_a_judge_is_asked_once_before_a_run(judge):
    check(judge.section())
    assert len(judge.requests) == 1
    assert "1 + 1" in judge.messages[0]


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (401, "no key", "refuses to answer as 'sage': .*no key.*its key in OPENAI_API_KEY"),
        (
            400,
            "max_tokens is not supported",
            "does not answer .*max_tokens is not supported.*correct task.verdict",
        ),
        (200, "Let me think", "said 'Let me think'.*raise task.verdict.max_new_tokens"),
        (200, "Verdict: wrong", "did not find a right answer to 1 . 1 right"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused(judge, status, text, message):
    judge.reply = lambda _: (status, text)
    with pytest.raises(BadInputError, match=message):
        check(judge.section())


def test_a_judge_out_of_reach_is_refused(free_port):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(BadInputError, match=f"sage at {url} does not answer .* start it"):
        check(JudgeVerdict(by="judge", url=url, model="sage"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Is {{ answer right?", "cannot be rendered"),
        ("Is {{ reply }} right?", "cannot be rendered .'reply' is undefined.*question, gold and"),
        ("{{ question }}", "does not show the answer: add {{ answer }}"),
    ],
)
def test_a_template_that_cannot_be_used(judge, template, message):
    with pytest.raises(BadInputError, match=message):
        check(judge.section(template=template))
    assert judge.requests == []


def test_a_template_may_be_a_file(judge, store, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("Is {{ answer }} the answer to {{ question }}?")
    section = judge.section(template=str(file))
    file.unlink()  # its text is in the section
    judge_grader(section, store)([(FREE, "Roses")])
    assert judge.messages == ["Is Roses the answer to Write a poem.?"]
