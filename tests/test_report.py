import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from cluster import storage
from cluster.config import parse_config
from cluster.publishing import publish_folder, staging_folder
from cluster.run_folder import RunFolder
from evals.accuracy import Answer, answers_table, describe
from evals.report import write_report
from evals.stage import evaluate
from evals.table import results_table
from pipeline.rows import Pair, to_table
from serving.models import best_epoch, evaluation_name

EVIL = "<script>alert(1)</script> so \\boxed{5}"
PAIR = Pair(
    prompt_id="p1",
    prompt="1 + 3?",
    chosen="It is \\boxed{4}",
    rejected=EVIL,
    chosen_model="t",
    chosen_epoch=0,
    rejected_model="s",
    rejected_epoch=0,
    rejected_fallback=False,
    chosen_finished=True,
    rejected_finished=True,
)
NONE = replace(
    PAIR, rejected=None, rejected_model=None, rejected_epoch=None, rejected_finished=None
)


@pytest.fixture
def config(tmp_path):
    raw = {
        "run": {"folder": str(tmp_path / "run")},
        "task": {"name": "word_problems"},
        "teacher": {"model": "big", "few_shot": [{"question": "1 + 1?", "answer": "\\boxed{2}"}]},
        "student": {"model": "small<b>"},
        "training": {"epochs": 2},
    }
    return parse_config(raw, "test")


@pytest.fixture
def run(config):
    run = RunFolder(storage.location(config.run.folder))
    run.root.mkdir(parents=True)
    storage.write_json(
        run.root / "environment.json",
        {"packages": {"ray": "2.60.0"}, "platform": "Linux", "commit": "abc"},
    )
    for step in range(1, 5):
        run.record(stage="train", step=step, epoch=1 + step // 3, loss=2.0 / step, margin=step)
    for epoch, pairs in (
        (1, [PAIR, NONE]),
        (2, [replace(PAIR, prompt_id="p2", rejected_epoch=1), PAIR]),
    ):
        publish(run.checkpoint(epoch), {"config.json": "{}"})
        folder = staging_folder(run.pairs(epoch))
        table = to_table(Pair, pairs)
        storage.write_table(table, storage.location(str(folder / "pairs.parquet")))
        publish_folder(folder, run.pairs(epoch))
    for model, right in (("base", 1), ("student-epoch-1", 3), ("student-epoch-2", 2)):
        write_result(run, model, "test", right)
    return run


def publish(target, files):
    folder = staging_folder(target)
    for name, text in files.items():
        (folder / name).write_text(text)
    publish_folder(folder, target)


def write_result(run, model, split, right):
    answers = [
        Answer(
            f"p{i}", f"Problem {i}?", EVIL, "5", "right" if i < right else "unparsed", "stop", None
        )
        for i in range(4)
    ]
    file = run.evaluation(evaluation_name(model, split))
    record = {"task": "word_problems", "split": split, "model": model, **describe(answers)}
    storage.write_json(file, record)
    storage.write_table(answers_table(answers), file.with_suffix(".parquet"))


def test_report_is_one_file_without_script_or_network(run, config):
    write_report(run, config)
    page = (run.root / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "small&lt;b&gt;" in page
    assert "small<b>" not in page
    assert "Rejected (base student)" in page
    assert "Rejected (student after epoch 1)" in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert page.count("<svg") == 3  # accuracy, loss, margin


def test_report_has_results_and_audit(run, config):
    write_report(run, config)
    page = " ".join((run.root / "report.html").read_text().split())
    # p = 3/4, SE = sqrt(3/16 / 4) = 0.2165
    assert "<td>student after epoch 1</td> <td>75.0 ± 21.7</td>" in page
    assert (
        "<td>1</td><td>2</td> <td>0.0</td><td>50.0</td> <td>0.0</td><td>0.0</td> <td>50.0</td>"
        in page
    )
    assert (
        "<td>2</td><td>2</td> <td>50.0</td><td>50.0</td> <td>0.0</td><td>0.0</td> <td>0.0</td>"
        in page
    )
    assert page.count("Rejected (base student):") == 1


def test_negatives_of_the_teacher_are_called_so(run, config):
    raw = config.model_dump(mode="json") | {"pairs": {"negatives_from": "teacher", "phi": 0}}
    write_report(run, parse_config(raw, "test"))
    page = " ".join((run.root / "report.html").read_text().split())
    counted = (
        "<td>1</td><td>2</td> <td>0.0</td><td>0.0</td> <td>0.0</td><td>50.0</td> <td>50.0</td>"
    )
    assert counted in page
    assert "Rejected (teacher):" in page
    assert "Rejected (base student):" not in page


def test_model_card_has_a_row_a_model(run, config):
    write_report(run, config)
    card = (run.root / "README.md").read_text()
    assert (
        '| student after epoch 2 (served as "student") | 50.0 ± 25.0 | 50.0 | 100.0 | 4 |' in card
    )
    assert "shown 1 worked examples" in card
    assert "\n\n\n" not in card


def test_a_teacher_that_others_serve_is_named_with_its_host(run, config):
    raw = config.model_dump(mode="json")
    raw["teacher"] |= {"endpoint": {"url": "https://api.example.com/v1"}}
    foreign = parse_config(raw | {"further_teachers": [{"model": "second"}]}, "test")
    write_result(run, "teacher", "test", 4)
    write_report(run, foreign)
    card, page = ((run.root / name).read_text() for name in ("README.md", "report.html"))
    title = "big at api.example.com (shown 1 worked examples)"
    assert f"right traces of\n{title} and\nsecond by\nORPO-Distill" in card
    assert "| teacher (big at api.example.com, shown 1 worked examples) |" in card
    assert "serve them with the base model on one" in card
    assert "taught by big at api.example.com and second." in page


def test_report_of_a_run_that_has_just_begun(config):
    run = RunFolder(storage.location(config.run.folder))
    run.root.mkdir(parents=True)
    write_report(run, config)
    assert "Nothing is evaluated yet" in (run.root / "report.html").read_text()


def test_a_task_without_verdicts_has_a_report_and_a_table(run, config):
    for file in (run.root / "evals").iterdir():
        file.unlink()
    chat = config.model_copy(update={"task": config.task.model_copy(update={"name": "chat"})})
    evaluate(run, chat)
    write_report(run, chat)
    assert "answers of this task have no verdict" in (run.root / "report.html").read_text()
    card = (run.root / "README.md").read_text()
    assert "right traces" not in card
    assert "nobody graded" in card
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(results_table(run, chat))
    assert "chat: nothing is evaluated" in console.export_text()
    assert not list((run.root / "evals").iterdir())


def test_a_step_taken_twice_is_drawn_once(run, config):
    from evals.report import _training_steps

    run.record(stage="train", step=2, epoch=1, loss=9.0, margin=0.0)
    steps = _training_steps(run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[1]["loss"] == 9.0


def test_table_marks_the_best_epoch(run, config):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(results_table(run, config))
    lines = console.export_text().splitlines()
    assert [line for line in lines if "epoch 2 *" in line]
    assert [line for line in lines if "75.0 ± 21.7" in line and "25.0" in line]


def test_best_epoch_goes_by_validation_and_else_is_the_last(run):
    assert best_epoch(run, []) is None
    assert best_epoch(run, [1, 2]) == 2
    write_result(run, "student-epoch-1", "validation", 3)
    assert best_epoch(run, [1, 2]) == 2  # epoch 2 is not known yet
    write_result(run, "student-epoch-2", "validation", 2)
    assert best_epoch(run, [1, 2]) == 1
    write_result(run, "student-epoch-2", "validation", 3)
    assert best_epoch(run, [1, 2]) == 1  # of equals, the one that was trained less


def test_results_are_json_numbers(run):
    result = json.loads(run.evaluation("base_test").read_text())
    assert result["accuracy"] == 0.25
    assert result["accuracy_given_parsed"] == 1.0
    assert result["unparsed"] == 0.75


METHODS = [
    ({"method": "orpo"}, "lambda = 1.0."),
    ({"method": "sft", "kl_weight": 0.2}, "(NLL alone), with the reverse KL to the teacher"),
    ({"method": "dadpo", "teacher_weight": 0.3}, "beta 2 = 0.3 (teacher)."),
    ({"method": "kto"}, "KTO (arXiv:2402.01306), beta = 0.1."),
]


@pytest.mark.parametrize(("training", "words"), METHODS)
def test_the_card_names_the_method(run, config, training, words):
    method = config.training.model_copy(update=training)
    write_report(run, config.model_copy(update={"training": method}))
    card = (run.root / "README.md").read_text()
    assert words in card
    assert "\n\n\n" not in card


def test_code_that_came_with_a_model_is_told(run, config):
    write_report(run, config)
    assert "code that came with" not in (run.root / "README.md").read_text()
    student = config.student.model_copy(update={"trust_remote_code": True})
    write_report(run, config.model_copy(update={"student": student}))
    card, page = ((run.root / name).read_text() for name in ("README.md", "report.html"))
    assert "\n- ran code that came with small<b> (student.trust_remote_code)\n" in card
    assert "Ran code that came with small&lt;b&gt; (student.trust_remote_code)." in page
