"""Several teachers: what the configuration says of them, and how their traces become one pool."""

import json
import re
from collections import defaultdict
from itertools import count

import pytest

from cluster import storage
from cluster.config import parse_config, recipe_of
from cluster.errors import BadInputError
from cluster.publishing import read_published
from cluster.run_folder import RunFolder
from pipeline.resampler import MixedPolicyResampler
from pipeline.rows import Pair, Trace, from_table
from pipeline.tasks import load_prompts, user_message
from pipeline.teachers import pool_teachers
from pipeline.traces import teacher

ENDPOINT = {"url": "https://api.example.com/v1"}
LIMITED = {
    "price_per_million_input_tokens": 1,
    "price_per_million_output_tokens": 2,
    "spending_limit": 5,
}


def config(teacher=None, further=(), **sections):
    raw = {
        "run": {"folder": "runs/x"},
        "task": {"name": "word_problems"},
        "teacher": {"model": "big", "endpoint": ENDPOINT, **(teacher or {})},
        "further_teachers": list(further),
        "student": {"model": "small"},
        **sections,
    }
    return parse_config(raw, "test")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"endpoint": {"url": "api.example.com/v1"}}, "teacher.endpoint.url must be a base URL"),
        ({"endpoint": {"url": "https://me:sk-1@example.com/v1"}}, "without user, password"),
        ({"endpoint": {"url": "https://example.com/v1?key=sk-1"}}, "or query"),
        ({"endpoint": ENDPOINT | {"api_key": "sk-1"}}, "api_key is not an option: options here"),
        ({"endpoint": ENDPOINT | {"api_key_env": "sk-1"}}, "must be the NAME of an environment"),
        ({"endpoint": ENDPOINT | {"api_key_env": "gsk_1"}}, "must be the NAME of an environment"),
        ({"endpoint": ENDPOINT | {"spending_limit": 5}}, "must have both prices and spending_limi"),
        ({"endpoint": ENDPOINT | LIMITED | {"spending_limit": None}}, "must have both prices and"),
        (
            {"endpoint": ENDPOINT | {"price_per_million_input_tokens": 1, "spending_limit": 5}},
            "must have both prices and",
        ),
        (
            {
                "endpoint": ENDPOINT | LIMITED | dict.fromkeys(list(LIMITED)[:2], 0)  # both prices
            },
            "never reached at prices of 0",
        ),
        ({"dtype": "float32"}, "teacher.dtype is for a model on this cluster's engines"),
        ({"chat_template": "{{ x }}"}, "teacher.chat_template is for"),
        ({"traces_per_prompt": 0}, "teacher.traces_per_prompt=0"),
    ],
)
def test_what_cannot_work_is_refused_without_telling_a_key(teacher, message):
    with pytest.raises(BadInputError, match=re.escape(message)) as refused:
        config(teacher)
    assert "sk-1" not in str(refused.value)


def test_a_teacher_that_is_there_twice_is_refused_whatever_its_limits():
    limited = {"model": "big", "endpoint": ENDPOINT | LIMITED, "traces_per_prompt": 2}
    with pytest.raises(BadInputError, match=r"further_teachers\[0\] writes the very traces of tea"):
        config(further=[limited])
    shown = {**limited, "few_shot": [{"question": "1 + 1?", "answer": "2"}]}
    assert list(config(further=[shown]).teachers) == ["teacher", "teacher_2"]


def test_mistakes_in_further_teachers_name_their_place():
    with pytest.raises(BadInputError, match=r"further_teachers\[1\]\.endpoint must have both"):
        config(
            further=[{"model": "a"}, {"model": "b", "endpoint": ENDPOINT | {"spending_limit": 1}}]
        )
    with pytest.raises(
        BadInputError, match=r"further_teachers\.0\.modle is not an option: .*model"
    ):
        config(further=[{"model": "a", "modle": "b"}])


def test_limits_prices_and_pace_may_change_within_a_run_and_the_place_may_not():
    def recipe(endpoint):
        teacher = {"model": "big", "endpoint": ENDPOINT | endpoint}
        return recipe_of(config({"endpoint": ENDPOINT | endpoint}, [{**teacher, "stop": ["x"]}]))

    plain = recipe({})
    assert recipe({**LIMITED, "requests_per_minute": 9, "api_key_env": "OTHER"}) == plain
    moved = recipe({"url": "https://elsewhere.example.com/v1"})
    assert {name for name in plain if plain[name] != moved[name]} == {
        "teacher.endpoint.url",
        "further_teachers[0].endpoint.url",
    }


def test_a_reader_sees_who_serves_the_teacher():
    several = config(further=[{"model": "org/other"}]).teachers
    assert [teacher.title for teacher in several.values()] == [
        "big at api.example.com",
        "org/other",
    ]


WORDS = [f"{a} {b}" for a in ("ten", "eleven", "twelve") for b in ("apples", "pears", "plums")]


def trace(teacher, index, text, prompt_id="p", kept=True):
    return Trace(
        key=f"{teacher}/{prompt_id}/{index}",
        prompt_id=prompt_id,
        sample_index=index,
        model=teacher,
        epoch=0,
        text=text,
        finish_reason="stop",
        tokens=1,
        error=None,
        answer="1",
        verdict="right" if kept else "wrong",
        kept=kept,
    )


def pooled(traces, caps=None, max_rouge_l=0.8):
    caps = dict.fromkeys(traces) | (caps or {})
    entered = pool_teachers(traces, caps, max_rouge_l)
    return {name: [trace.text for trace in found] for name, found in entered.items()}


def test_a_near_copy_of_an_earlier_teachers_trace_stays_out():
    first, second = "one two three four five", "one two three four six seven"
    traces = {"a": [trace("a", 0, first)], "b": [trace("b", 0, first), trace("b", 1, second)]}
    assert pooled(traces) == {"a": [first], "b": [second]}
    # ROUGE-L of the two is 2 * (4/5) * (4/6) / (4/5 + 4/6) = 0.727
    assert pooled(traces, max_rouge_l=0.7) == {"a": [first], "b": []}
    assert pooled(dict(reversed(traces.items())), max_rouge_l=0.7) == {
        "b": [first, second],
        "a": [],
    }


def test_copies_on_different_prompts_are_no_copies():
    traces = {"a": [trace("a", 0, "same", "p")], "b": [trace("b", 0, "same", "q")]}
    assert pooled(traces) == {"a": ["same"], "b": ["same"]}


def test_a_cap_counts_what_enters_for_each_prompt():
    own = [trace("b", index, text) for index, text in enumerate(WORDS[:4])]
    other_prompt = [trace("b", 9, WORDS[5], "q")]
    traces = {"a": [trace("a", 0, WORDS[0])], "b": own + other_prompt}
    # b's first trace is a copy of a's: it takes none of b's two places
    assert pooled(traces, {"b": 2})["b"] == [WORDS[1], WORDS[2], WORDS[5]]


def test_the_cap_of_an_only_teacher_holds_too():
    traces = {"a": [trace("a", index, text) for index, text in enumerate(WORDS)]}
    assert pooled(traces)["a"] == WORDS
    assert pooled(traces, {"a": 3})["a"] == WORDS[:3]


def test_only_kept_traces_enter_and_one_beyond_a_cap_keeps_nobody_out():
    traces = {
        "a": [
            trace("a", 0, WORDS[0], kept=False),
            trace("a", 1, WORDS[1]),
            trace("a", 2, WORDS[2]),
        ],
        "b": [trace("b", 0, WORDS[0]), trace("b", 1, WORDS[2])],
    }
    assert pooled(traces, {"a": 1}) == {"a": [WORDS[1]], "b": [WORDS[0], WORDS[2]]}


def test_the_pairs_of_two_teachers_say_whose_trace_each_is(chat_server, tmp_path):
    golds, asked = {}, defaultdict(count)
    first = chat_server(lambda body: f"As ever, it is {box(body)}")
    second = chat_server(lambda body: f"{WORDS[next(asked[said(body)])]}, so {box(body)}")

    def said(body):
        return body["messages"][-1]["content"]

    def box(body):
        return f"\\boxed{{{golds[said(body)]}}}"

    settings = config(
        {"endpoint": {"url": first.url}},
        [{"model": "big", "endpoint": {"url": second.url}, "traces_per_prompt": 2}],
        run={"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        task={"name": "word_problems", "train_prompts": 5},
        cluster={"accelerator": "cpu"},
        training={"method": "sft"},
    )
    prompts = load_prompts(settings.task, "train", settings.run.seed)
    golds.update({user_message(prompt): prompt.gold for prompt in prompts})
    run = RunFolder(storage.location(settings.run.folder))
    counts = MixedPolicyResampler(run, settings).prepare_epoch(1)

    files = {name: traces_of(run, name) for name in ("teacher", "teacher_2")}
    assert {name: len(traces) for name, traces in files.items()} == {"teacher": 40, "teacher_2": 40}
    digests = {name: {trace.model for trace in traces} for name, traces in files.items()}
    assert all(len(found) == 1 for found in digests.values())
    assert digests["teacher"] != digests["teacher_2"]

    pairs = from_table(Pair, read_published(run.pairs(1)))
    written = {name: [p for p in pairs if {p.chosen_model} == digests[name]] for name in files}
    # Of eight times the same text one is kept, and two of the second teacher's may enter.
    assert {name: len(found) for name, found in written.items()} == {"teacher": 5, "teacher_2": 10}
    assert counts["pairs"] == 15
    assert {pair.chosen_epoch for pair in pairs} == {0}
    (line,) = (line for line in run.records() if line["stage"] == "pool")
    assert line == {"stage": "pool", "epoch": 1, "teacher": 5, "teacher_2": 10}
    assert len(first.bodies) == len(second.bodies) == 40


def traces_of(run, name):
    return from_table(Trace, storage.read_table(run.completions(name)))


def test_a_resampler_asks_with_the_keys_that_it_is_given(chat_server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "old")
    server = chat_server(lambda _: "\\boxed{1}")
    settings = config(
        {"endpoint": {"url": server.url, "api_key_env": "TEACHER_KEY"}},
        run={"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        task={"name": "word_problems", "train_prompts": 1},
        cluster={"accelerator": "cpu"},
    )
    run = RunFolder(storage.location(settings.run.folder))
    resampler = MixedPolicyResampler(run, settings, None, {"TEACHER_KEY": "of the driver"})
    resampler._traces.of(teacher("teacher", settings))
    assert set(server.keys) == {"Bearer of the driver"}
    assert "of the driver" not in json.dumps(run.records())
