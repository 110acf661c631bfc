"""The plan: what is counted, and what a reader sees of the prompts."""

import io
import json
import re
import shutil

import pytest
from rich.console import Console

from cluster.run_folder import RunFolder
from cluster.storage import location
from pipeline.plan import describe_plan, plan_run
from pipeline.tasks import load_prompts
from pipeline.traces import Traces, teacher


def rows(plan):
    return dict(plan.rows)


def test_traces_pairs_and_steps_are_counted(plan_of):
    found = rows(plan_of())
    assert found["task"] == "word_problems: 10 train, 2 validation, 3 test prompts"
    # The base student, and those after epochs 1 and 2, which epochs 2 and 3 draw from.
    assert found["sampling"] == "40 traces of the teacher, 3 x 40 of students"
    assert "3 epochs, about 20 pairs and 15 steps" in found["training"]


@pytest.mark.parametrize(
    ("sections", "students"),
    [
        ({"pairs": {"phi": 0}}, 1),
        ({"pairs": {"phi": 1}}, 3),
        ({"training": {"epochs": 1}}, 1),
        ({"training": {"method": "sft"}}, 0),
    ],
)
def test_later_students_are_sampled_only_where_pairs_draw_from_them(plan_of, sections, students):
    asked = f", {students} x 40 of students" if students else ""
    assert rows(plan_of(**sections))["sampling"] == f"40 traces of the teacher{asked}"


@pytest.mark.parametrize(
    ("method", "unread"),
    [
        ("orpo", "training.teacher_weight, training.desirable_weight"),
        ("dadpo", "training.desirable_weight"),
        ("kto", "training.teacher_weight"),
        ("sft", "pairs.phi, training.teacher_weight, training.desirable_weight"),
    ],
)
def test_options_that_a_method_does_not_read_are_named(plan_of, method, unread):
    weights = {"teacher_weight": 0.3, "desirable_weight": 2, "odds_ratio_weight": 1}
    plan = plan_of(pairs={"phi": 1}, training={"method": method, **weights})
    assert rows(plan)["not read"].startswith(f"{unread}: ")


def test_what_every_method_reads_is_not_named(plan_of):
    assert "not read" not in rows(plan_of(training={"kl_weight": 0.1, "learning_rate": 1e-3}))


@pytest.fixture
def chats(tmp_path):
    """A file of prompts, and a folder of the user's own functions."""
    rows = [{"prompt": f"Write {n} words."} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text("def is_right(answer, prompt):\n    return True\n")
    return {"name": "chat", "data": str(tmp_path / "chats.jsonl"), "train_prompts": 20}


def test_an_open_task_needs_no_verdict(plan_of, chats):
    plan = plan_of(task=chats, sampling={"samples": 1, "temperature": 0})
    assert not plan.refusals
    assert rows(plan)["verdict"].startswith("none: each answer of the teacher is chosen")
    assert "about 20 pairs" in rows(plan)["training"]
    student = dict(plan.rendered)["student reads"]
    assert "Write" in student
    assert "boxed" not in student


def test_an_open_task_may_have_one(plan_of, chats, tmp_path):
    verdict = {"by": "function", "function": f"{tmp_path / 'mine.py'}:is_right"}
    plan = plan_of(task=chats | {"verdict": verdict})
    assert not plan.refusals
    assert rows(plan)["verdict"] == f"by the function {tmp_path / 'mine.py'}:is_right"
    assert "about 40 pairs" in rows(plan)["training"]


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ({"by": "function", "function": "mine.py"}, "names no function"),
        ({"by": "unit_tests"}, "needs a column tests .* 24 of 24 prompts have none"),
        ({"by": "judge", "url": "http://127.0.0.1:9/v1", "model": "sage"}, "does not answer"),
    ],
)
def test_a_verdict_that_cannot_be_given_is_refused(plan_of, chats, verdict, message):
    counts = {"validation_prompts": 2, "test_prompts": 2}
    (refusal,) = plan_of(task=chats | counts | {"verdict": verdict}).refusals
    assert re.search(message, refusal)


def test_the_prompts_are_shown_as_each_model_reads_them(plan_of):
    plan = plan_of()
    screen = Console(file=io.StringIO(), width=10_000)
    screen.print(describe_plan(plan, with_prompts=True))
    shown = screen.file.getvalue()
    assert not plan.refusals
    teacher, student = (line for line in shown.splitlines() if " reads " in line)
    assert "1 + 1?" in teacher
    assert "1 + 1?" not in student
    assert "<|start|>assistant" in student


def test_a_context_too_short_is_refused_with_its_number(plan_of):
    plan = plan_of(engines={"max_model_len": 64})
    assert any("engines.max_model_len" in refusal for refusal in plan.refusals)


def test_a_teachers_negatives_need_verdicts(plan_of, chats):
    pairs = {"negatives_from": "teacher", "phi": 0}
    refusals = plan_of(task=chats, pairs=pairs).refusals
    assert any("needs wrong answers, and chat has no verdicts" in refusal for refusal in refusals)


def test_who_answers_an_evaluation_must_have_room_for_it(plan_of):
    small = {"serving": {"max_model_len": 100}}
    assert any("serving.max_model_len" in refusal for refusal in plan_of(**small).refusals)
    assert plan_of(**small, evaluation={"through": "engines"}).refusals == []


def test_a_few_prompts_too_long_are_left_to_their_rows_and_many_are_refused(plan_of, tmp_path):
    questions = [f"What is {number} + 1?" for number in range(40)]
    questions[3] = "Add: " + " ".join(["1"] * 800)
    data = tmp_path / "train.jsonl"
    rows = [{"question": text, "answer": "#### 1"} for text in questions]
    data.write_text("\n".join(map(json.dumps, rows)))
    counts = {"train_prompts": None, "validation_prompts": 1, "test_prompts": 1}
    task = {"name": "gsm8k", "data": str(data), **counts}
    refused = plan_of(task=task).refusals
    assert any("do not fit in engines.max_model_len=512" in refusal for refusal in refused)
    assert not plan_of(task=task, sampling={"max_error_share": 0.05}).refusals


def test_a_student_that_scales_its_logits_is_refused(plan_of, tiny_llama, tmp_path):
    scaled = tmp_path / "scaled"
    shutil.copytree(tiny_llama, scaled)
    settings = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(settings | {"logits_scaling": 8.0}))
    assert not plan_of(teacher={"model": str(scaled)}).refusals
    (refusal,) = plan_of(student={"model": str(scaled)}).refusals
    assert "'logits_scaling': 8.0" in refusal


PRICES = {"price_per_million_input_tokens": 10, "price_per_million_output_tokens": 20}


def test_a_teacher_behind_an_endpoint_is_asked_nothing_that_costs(plan_of, chat_server):
    server = chat_server()
    endpoint = {"url": server.url, "requests_per_minute": 4, **PRICES, "spending_limit": 0.05}
    plan = plan_of(teacher={"model": "big", "endpoint": endpoint})
    assert not plan.refusals
    assert not server.bodies
    # 4 samples of 10 train prompts, and an answer to each of 3 test prompts, of 32 tokens each.
    host = server.url.removeprefix("http://").removesuffix("/v1")
    assert rows(plan)["teacher"] == (
        f"big at {host}: 43 requests, 0 of them in the store, the rest in at least 11 min"
    )
    cost = rows(plan)["teacher's cost"]
    prompt_tokens = int(cost.partition("(about ")[2].partition(" ")[0])
    # 43 answers of 32 tokens at 20 a million come to 0.02752, prompt tokens to 10 a million.
    assert cost.startswith(f"at most about {prompt_tokens / 1e5 + 0.02752:.4g} (")
    assert "at most 1376 of answers), 0 spent of spending_limit=0.05; where that" in cost
    # The worked example is sent with each: the teacher's prompts are longer than the student's.
    student = int(rows(plan)["student"].partition("longest prompt ")[2].split()[0])
    assert prompt_tokens > 43 * student
    assert rows(plan)["sampling"].startswith("40 traces of the teacher")


def test_what_the_teacher_would_refuse_is_refused_by_the_plan(plan_of, chat_server):
    server = chat_server(models=("other",))
    (refusal,) = plan_of(teacher={"model": "big", "endpoint": {"url": server.url}}).refusals
    assert "has no model 'big', only other" in refusal


def test_an_endpoint_that_will_not_be_asked_any_more_need_not_be_there(
    config_of, chat_server, tmp_path
):
    server = chat_server()
    options = {
        "run": {"store": str(tmp_path / "store")},
        "cluster": {"accelerator": "cpu"},
        "teacher": {"model": "big", "endpoint": {"url": server.url}},
        "evaluation": {"teacher": False},
    }
    config = config_of(**options)
    prompts = load_prompts(config.task, "train", config.run.seed)
    Traces(RunFolder(location(config.run.folder)), config, prompts, False).of(
        teacher("teacher", config)
    )
    server.models = 401
    plan = plan_run(config)
    assert not plan.refusals
    assert "40 requests, 40 of them in the store" in rows(plan)["teacher"]


def test_each_of_several_teachers_is_planned(plan_of, tiny_llama, tiny_gemma, chat_server):
    endpoint = {"url": chat_server().url}
    further = [
        {"model": "big", "endpoint": endpoint, "traces_per_prompt": 1},
        {"model": str(tiny_gemma)},
    ]
    plan = plan_of(further_teachers=further)
    assert not plan.refusals
    found = rows(plan)
    assert found["sampling"] == "40 traces of each of 3 teachers, 3 x 40 of students"
    assert "40 requests" in found["teacher_2"], "further teachers are not evaluated"
    assert "no prices are given" in found["teacher_2's cost"]
    assert tiny_gemma.name in found["teacher_3"]
    # 4 + 1 + 4 traces of 10 prompts, half of them right
    assert "about 45 pairs" in found["training"]


def test_code_that_comes_with_a_model_is_shown(plan_of, tiny_llama):
    assert "code" not in rows(plan_of())
    plan = plan_of(student={"trust_remote_code": True})
    name = str(tiny_llama)
    assert ("code", f"{name} brings code of its own, which RUNS (student.trust_remote_code)") in (
        plan.rows
    )
    other = {"model": "org/other", "trust_remote_code": True}
    shown = [value for title, value in plan_of(further_teachers=[other]).rows if title == "code"]
    assert shown == [
        "org/other brings code of its own, which RUNS (further_teachers[0].trust_remote_code)"
    ]


def test_an_open_endpoint_without_a_key_is_refused(plan_of, monkeypatch):
    monkeypatch.delenv("POTSTILL_API_KEY", raising=False)
    assert any("POTSTILL_API_KEY" in line for line in plan_of(serving={"host": "0.0.0.0"}).refusals)
    monkeypatch.setenv("POTSTILL_API_KEY", "a-key")
    assert plan_of(serving={"host": "0.0.0.0"}).refusals == []
