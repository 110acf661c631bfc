import json
from dataclasses import replace

import pytest

from cluster.config import parse_config
from cluster.errors import BadInputError
from cluster.refusals import refuse_taken_port
from serving.app import Endpoint, _deployment, _on_gpu
from serving.models import ServedModel, engines_of, in_turn, routes_of
from serving.routes import Route, renamed, stop_ids, stop_strings, with_few_shot
from serving.stage import _describe

BASE = ServedModel("base", "/models/a", stop_token_ids=(2,))
SHOTS = (("1 + 1?", "\\boxed{2}"), ("2 + 2?", "\\boxed{4}"))
TEACHER = replace(BASE, model_id="teacher", few_shot=SHOTS, stop=("\n\n",), resident=False)


def user(text):
    return {"role": "user", "content": text}


def test_few_shot_turns_go_before_the_conversation():
    messages = with_few_shot([user("3 + 3?")], SHOTS)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert [message["content"] for message in messages[:2]] == ["1 + 1?", "\\boxed{2}"]
    assert messages[-1] == user("3 + 3?")


def test_system_message_stays_in_front():
    system = {"role": "system", "content": "Be brief."}
    messages = with_few_shot([system, user("3 + 3?")], SHOTS[:1])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]


def test_callers_messages_are_not_changed():
    messages = [user("3 + 3?")]
    with_few_shot(messages, SHOTS)
    assert messages == [user("3 + 3?")]


def test_callers_stop_strings_win():
    route = Route("base", stop=("\n\n",))
    assert stop_strings(None, route) == ["\n\n"]
    assert stop_strings([], route) == ["\n\n"]
    assert stop_strings(["."], route) == ["."]
    assert stop_strings(None, Route("base")) is None


def test_end_of_turn_is_added_to_stop_tokens():
    assert stop_ids([7], Route("base", stop_token_ids=(2,))) == [7, 2]
    assert stop_ids(None, Route("base", stop_token_ids=(2,))) == [2]


def test_response_names_the_model_as_asked():
    text = json.dumps({"model": "base", "content": 'the "model":"base" itself'})
    assert json.loads(renamed(text, "base", "teacher")) == {
        "model": "teacher",
        "content": 'the "model":"base" itself',
    }
    chunk = 'data: {"id":"1","model":"base","choices":[]}\n\n'
    assert '"model": "teacher"' in renamed(chunk, "base", "teacher")


def test_equal_models_share_an_engine():
    engines = engines_of([BASE, TEACHER])
    assert engines["teacher"] == engines["base"]
    assert engines["teacher"].engine_id == "base"
    assert routes_of([BASE, TEACHER])["teacher"] == Route("base", SHOTS, ("\n\n",), (2,))


@pytest.mark.parametrize(
    "difference",
    [{"reference": "/models/b"}, {"dtype": "float32"}, {"chat_template": "{{ messages }}"}],
)
def test_other_weights_dtype_or_template_need_an_engine_of_their_own(difference):
    engines = engines_of([BASE, replace(TEACHER, **difference)])
    assert engines["teacher"].engine_id == "teacher"
    assert not engines["teacher"].resident


def test_one_model_under_two_names_is_one_engine():
    base, teacher = replace(BASE, digest="d"), replace(TEACHER, digest="d", reference="/models/b")
    assert engines_of([base, teacher])["teacher"].engine_id == "base"


def test_engine_is_resident_if_one_of_its_ids_is():
    epoch = ServedModel("student-epoch-1", "/models/b", resident=False)
    best = replace(epoch, model_id="student", resident=True)
    engines = engines_of([epoch, best])
    assert engines["student-epoch-1"].resident
    assert engines["student"].engine_id == "student-epoch-1"
    assert not engines_of(in_turn([epoch, best]))["student"].resident


def test_engine_on_demand_scales_to_zero():
    assert _deployment(False, 10)["autoscaling_config"]["min_replicas"] == 0
    assert _deployment(True, 10)["autoscaling_config"]["min_replicas"] == 1


def config_with_gpus(gpus, **sections):
    raw = {
        "run": {"folder": "run"},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
        "serving": {"gpus_per_model": gpus},
        **sections,
    }
    return parse_config(raw, "test")


def test_share_of_a_gpu_takes_that_share_of_its_memory():
    options = _on_gpu(config_with_gpus(0.5))
    assert options["engine_kwargs"]["gpu_memory_utilization"] == pytest.approx(0.45)
    assert options["engine_kwargs"]["tensor_parallel_size"] == 1
    assert options["placement_group_config"]["bundle_per_worker"]["GPU"] == 0.5


def test_two_gpus_share_a_model():
    options = _on_gpu(config_with_gpus(2))
    assert options["engine_kwargs"]["tensor_parallel_size"] == 2
    assert options["placement_group_config"]["bundle_per_worker"]["GPU"] == 1


@pytest.mark.parametrize("gpus", [0, 1.5])
def test_impossible_shares_of_gpus_are_refused(gpus):
    with pytest.raises(BadInputError, match="gpus_per_model"):
        config_with_gpus(gpus)


def test_a_taken_port_is_refused():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(BadInputError, match=f"port={port}"):
            refuse_taken_port("127.0.0.1", port)
    refuse_taken_port("127.0.0.1", port)


def test_what_is_served_is_told_with_its_code_and_its_key(capsys, monkeypatch):
    monkeypatch.delenv("POTSTILL_API_KEY", raising=False)
    student = ServedModel("student", "org/one", trust_remote_code=True)
    endpoint = Endpoint("app", "http://127.0.0.1:8000/v1", (BASE, student), 1.0)
    _describe(endpoint, config_with_gpus(1, task={"name": "word_problems"}))
    said = capsys.readouterr().out
    assert "student: loaded; runs code that came with it (trust_remote_code)\n" in said
    assert "base: loaded\n" in said
    assert "POTSTILL_API_KEY" not in said
    monkeypatch.setenv("POTSTILL_API_KEY", "planted")
    _describe(endpoint, config_with_gpus(1, task={"name": "word_problems"}))
    said = capsys.readouterr().out
    assert "each request needs the key in POTSTILL_API_KEY" in said
    assert "planted" not in said
