"""The client of OpenAI-style endpoints against a real server, and the budget that it keeps."""

import asyncio
import time
from threading import Event

import pytest

from cluster.errors import BadInputError
from pipeline.endpoint import ChatEndpoint, ChatRequest, chat_all, check_endpoint
from pipeline.spending import Budget, LimitReachedError


def request(number):
    return ChatRequest([{"role": "user", "content": f"{number} + 1?"}], 7, {"seed": number})


def ask(server, count=4, budget=None, **options):
    """Replies in order of the requests; None where there is none."""
    replies = [None] * count

    def on_reply(position, reply):
        replies[position] = reply

    endpoint = ChatEndpoint(server.url, "big", **options)
    chat_all(endpoint, [request(number) for number in range(count)], on_reply, budget)
    return replies


def test_a_reply_has_text_reason_and_the_endpoints_count_of_tokens(chat_server):
    server = chat_server(lambda body: f"seed {body['seed']}" + "..." * (body["seed"] == 1))
    replies = ask(server, 2)
    assert [reply.text for reply in replies] == ["seed 0", "seed 1..."]
    assert [reply.finish_reason for reply in replies] == ["stop", "length"]
    assert {(reply.prompt_tokens, reply.tokens, reply.error) for reply in replies} == {
        (20, 5, None)
    }
    assert {(body["model"], body["max_tokens"]) for body in server.bodies} == {("big", 7)}


def test_the_limit_of_an_answer_goes_by_the_endpoints_name(chat_server):
    server = chat_server()
    ask(server, 1, length_parameter="max_completion_tokens")
    assert server.bodies[0]["max_completion_tokens"] == 7
    assert "max_tokens" not in server.bodies[0]


def test_the_key_is_read_from_the_variable_that_is_named(chat_server, monkeypatch):
    server = chat_server()
    monkeypatch.setenv("OTHER_KEY", "secret")
    ask(server, 1, key_variable="OTHER_KEY")
    assert server.keys == ["Bearer secret"]


def test_without_a_count_of_tokens_the_most_possible_counts(chat_server):
    server = chat_server()
    server.usage = False
    (reply,) = ask(server, 1)
    assert reply.prompt_tokens >= len("0 + 1?")
    assert reply.tokens == 7


@pytest.mark.fault
def test_a_refused_request_is_sent_again_as_late_as_the_endpoint_asks(chat_server):
    def reply(_):
        limited = len(server.bodies) == 1
        return (429, "slow down", {"retry-after": "1"}) if limited else "well"

    server = chat_server(reply)
    assert ask(server, 1)[0].text == "well"
    first, second = server.arrivals
    assert second - first >= 1  # of its own accord the client waits half a second


@pytest.mark.fault
def test_a_request_that_fails_in_the_end_is_a_reply_with_its_error(chat_server):
    server = chat_server(lambda body: (400, "too rude", {}) if body["seed"] == 2 else "well")
    replies = ask(server)
    assert [reply.text for reply in replies] == ["well", "well", "", "well"]
    assert "too rude" in replies[2].error
    assert (replies[2].tokens, replies[2].finish_reason) == (0, None)


def test_a_response_without_an_answer_is_an_error_too(chat_server):
    server = chat_server(lambda _: (200, "provider is down", {}))
    assert "provider is down" in ask(server, 1)[0].error


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_it_at_once(chat_server, status):
    server = chat_server(lambda _: (status, "refused", {}))
    with pytest.raises(BadInputError, match=r"refuses to answer as 'big'.*OPENAI_API_KEY"):
        ask(server, concurrency=1)
    assert len(server.bodies) == 1


def test_what_is_under_way_when_another_is_refused_is_still_heard(chat_server):
    refused, heard = Event(), []

    def reply(body):
        if body["seed"] == 0:
            refused.set()
            return 401, "refused", {}
        assert refused.wait(10)
        time.sleep(0.2)  # so that the refusal is there first
        return "paid for"

    endpoint = ChatEndpoint(chat_server(reply).url, "big", concurrency=2)
    with pytest.raises(BadInputError):
        chat_all(endpoint, [request(0), request(1), request(2)], lambda *it: heard.append(it))
    assert [(position, answer.text) for position, answer in heard] == [(1, "paid for")]


def test_concurrency_is_used_and_kept(chat_server):
    def reply(_):
        time.sleep(0.1)
        return "well"

    server = chat_server(reply)
    ask(server, 8, concurrency=3)
    assert server.most_under_way == 3


@pytest.mark.fault
def test_the_pace_holds_for_requests_that_are_sent_again_too(chat_server):
    def reply(body):
        again = [other["seed"] for other in server.bodies].count(body["seed"]) > 1
        return "well" if again else (503, "busy", {"retry-after-ms": "1"})

    server = chat_server(reply)
    ask(chat_server(), 1)  # what is loaded once takes a while
    started = time.monotonic()
    ask(server, 4, concurrency=4, requests_per_minute=600)
    assert len(server.bodies) == 8
    assert time.monotonic() - started >= 7 * 0.1 * 0.99  # the first goes at once


@pytest.mark.fault
def test_no_request_is_sent_that_might_pass_the_limit(chat_server):
    # At 1 a token a request is at most 16 + 6 + 7 = 29, and comes to 25.
    budget = Budget(1e6, 1e6, limit=100)
    server = chat_server()
    with pytest.raises(LimitReachedError, match="75 of 100 is spent"):
        ask(server, 9, budget, concurrency=8)
    assert (len(server.bodies), budget.spent) == (3, 75)


def test_what_was_set_aside_for_an_answer_that_came_short_is_free_again():
    budget, sent = Budget(output_price=1e6, limit=10), []

    async def one(number):
        async with budget.room_for(4) as pay:
            sent.append((number, budget.spent))
            await asyncio.sleep(0)
            pay(0, 1)

    async def all_of_them():
        return await asyncio.gather(*map(one, range(9)), return_exceptions=True)

    ended = asyncio.run(all_of_them())
    # Each may come to 4 and comes to 1: they go on until 7 are spent.
    assert len(sent) == budget.spent == 7
    assert sum(isinstance(error, LimitReachedError) for error in ended) == 2


def test_a_request_that_fails_costs_nothing(chat_server):
    budget = Budget(1.0, 1.0, limit=1.0)
    ask(chat_server(lambda _: (400, "too rude", {})), 2, budget)
    assert budget.spent == 0


@pytest.mark.parametrize(
    ("models", "model"),
    [
        (("big", "small"), "big"),
        (("models/big",), "big"),
        (("org/big",), "org/big:fast"),
        ((), "big"),
        (404, "big"),
    ],
)
def test_an_endpoint_that_has_the_model_or_keeps_no_list_is_accepted(chat_server, models, model):
    server = chat_server(models=models)
    check_endpoint(ChatEndpoint(server.url, model))
    assert not server.bodies, "no request that costs"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("large", "small"), "has no model 'big', only large, small"),
        (401, r"refuses the key.*OPENAI_API_KEY"),
        (403, "refuses the key"),
        (500, "is out of order"),
    ],
)
def test_an_endpoint_that_would_refuse_is_refused(chat_server, models, message):
    server = chat_server(models=models)
    with pytest.raises(BadInputError, match=message):
        check_endpoint(ChatEndpoint(server.url, "big"))


def test_a_place_where_nothing_answers_is_refused(free_port):
    with pytest.raises(BadInputError, match="nothing answers at"):
        check_endpoint(ChatEndpoint(f"http://127.0.0.1:{free_port()}/v1", "big"))
