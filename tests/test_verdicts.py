"""Verdicts on open prompts: by a function, by unit tests, and which of them a task has."""

from pathlib import Path

import pytest

from cluster.errors import BadInputError
from cluster.sections import FunctionVerdict, Task, UnitTestsVerdict
from cluster.storage import location
from pipeline.rows import Prompt
from pipeline.store import SampleStore
from pipeline.verdicts.choice import check_verdict, choose_grader, has_verdicts
from pipeline.verdicts.exact import grade_exactly
from pipeline.verdicts.function import function_grader
from pipeline.verdicts.unit_tests import find_code, unit_tests_grader

SAY = Prompt("p1", "Say three words.", "open", "yes we can", tests="assert f(2) == 4")
TRIVIAL = """
def three_words(answer, prompt):
    if not answer:
        return None
    return len(answer.split()) == 3 and prompt["gold"] == "yes we can"

def picky(answer, prompt):
    raise KeyError(prompt["question"])

def fuzzy(answer, prompt):
    return 0.7

def lonely(answer):
    return True

number = 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(TRIVIAL)
    return str(tmp_path / "mine.py")


def by_function(place: str) -> FunctionVerdict:
    return FunctionVerdict(by="function", function=place)


def test_a_function_says_right_wrong_or_unparsed(mine):
    grader = function_grader(by_function(f"{mine}:three_words"))
    answers = ["one two three", "one two", ""]
    assert grader([(SAY, answer) for answer in answers]) == ["right", "wrong", "unparsed"]


def test_a_function_may_be_in_a_module(mine, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(mine).parent))
    grader = function_grader(by_function("mine:three_words"))
    assert grader([(SAY, "one two three")]) == ["right"]


def test_a_function_that_raises_stops_with_the_prompt_and_its_error(mine):
    grader = function_grader(by_function(f"{mine}:picky"))
    with pytest.raises(BadInputError, match=r"prompt p1 raised KeyError: 'Say three words.'.* run"):
        grader([(SAY, "one")])


def test_a_function_that_returns_anything_else_is_no_verdict(mine):
    grader = function_grader(by_function(f"{mine}:fuzzy"))
    with pytest.raises(BadInputError, match=r"returned 0.7, expected True, False or None"):
        grader([(SAY, "one")])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("three_words", "names no function: expected package.module:name or path/to/file.py:name"),
        ("{mine}:nothing", "has no function 'nothing'"),
        ("{mine}:number", "has no function 'number'"),
        ("{mine}:lonely", "does not take an answer's text and a prompt"),
        ("/no/such/file.py:f", "no file at /no/such/file.py"),
        ("no_such_module:f", "cannot be imported .*No module named 'no_such_module'"),
        ("{broken}:f", "cannot be imported .ZeroDivisionError"),
    ],
)
def test_a_function_that_is_not_there(mine, tmp_path, place, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    place = place.format(mine=mine, broken=tmp_path / "broken.py")
    with pytest.raises(BadInputError, match=message):
        check_verdict(Task(name="chat", verdict=by_function(place)), [SAY])


FENCED = "Here:\n```python\ndef f(x): return 2 * x\n```\nDone."


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (FENCED, "def f(x): return 2 * x\n"),
        ("```py\na = 1\n```\n```python\na = 2\n```\n```bash\npip\n```", "a = 2\n"),
        ("```python title=x\na = 1\n```\nprints\n```\n1\n```", "a = 1\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("import re\nclass A:\n    pass", "import re\nclass A:\n    pass"),
        ("```python\ndef f(x): return x", None),  # cut before the block ends
        ("```bash\nls\n```", None),
        ("I would define f so that it doubles x.", None),
        ("The class of 1999", None),
        ("", None),
    ],
)
def test_the_code_of_an_answer(text, code):
    assert find_code(text) == code


def test_unit_tests_say_right_wrong_or_unparsed():
    grader = unit_tests_grader(UnitTestsVerdict(by="unit_tests", time_limit_s=2))
    answers = [FENCED, FENCED.replace("2 *", "3 *"), "Double it.", "```python\nf = (\n```"]
    verdicts = grader([(SAY, answer) for answer in answers])
    assert verdicts == ["right", "wrong", "unparsed", "wrong"]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "needs a column tests of Python code: 1 of 2 prompts have none, the first is p2"),
        ("assert f(2) ==", "tests of prompt p2 are no Python code: invalid syntax"),
        ("print(f(2))", "tests of prompt p2 cannot fail: expected code with assert"),
    ],
)
def test_tests_that_test_nothing_are_refused(tests, message):
    task = Task(name="chat", verdict=UnitTestsVerdict(by="unit_tests"))
    with pytest.raises(BadInputError, match=message):
        check_verdict(task, [SAY, Prompt("p2", "And now?", "open", None, tests=tests)])


def test_limits_that_nothing_passes_are_refused():
    task = Task(name="chat", verdict=UnitTestsVerdict(by="unit_tests", memory_limit_mib=1))
    with pytest.raises(
        BadInputError, match=r"not even `return 1` passes .*memory_limit_mib=1: raise"
    ):
        check_verdict(task, [SAY])


def test_exact_tasks_take_no_verdict_and_open_ones_need_none(mine):
    check_verdict(Task(name="gsm8k"), [])
    check_verdict(Task(name="chat"), [SAY])
    with pytest.raises(BadInputError, match="for open tasks such as chat; gsm8k has exact answers"):
        check_verdict(Task(name="gsm8k", verdict=by_function(f"{mine}:three_words")), [])


def test_which_tasks_have_verdicts(mine, tmp_path):
    chosen = Task(name="chat", verdict=by_function(f"{mine}:three_words"))
    assert [has_verdicts(task) for task in (Task(name="gsm8k"), Task(name="chat"), chosen)] == [
        True,
        False,
        True,
    ]
    store = SampleStore(location(str(tmp_path)))
    assert choose_grader(Task(name="chat"), store) is grade_exactly
    assert choose_grader(chosen, store)([(SAY, "a b c")]) == ["right"]


def test_open_answers_without_a_verdict_are_ungraded():
    number = Prompt("p2", "1 + 1?", "number", "2")
    assert grade_exactly([(SAY, "\\boxed{2}"), (number, "\\boxed{2}")]) == ["ungraded", "right"]
