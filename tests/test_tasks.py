import json
import re
from pathlib import Path

import pytest

from cluster.errors import BadInputError
from cluster.recipes import load_recipe
from cluster.sections import Task as Section
from pipeline.rows import Prompt
from pipeline.tasks import TASKS, instruct, load_prompts, user_message

FOUR = {"text": ["a star", " a moon", "a rock", "dust "], "label": ["A", "B", "C", "D"]}
READ = {"A": "a star", "B": "a moon", "C": "a rock", "D": "dust"}

ROWS = {
    "chat": ({"prompt": " Write a poem. "}, ("Write a poem.", None, None)),
    "gsm8k": (
        {"question": " How much? ", "answer": "1,000 + 80 = <<1000+80=1080>>1,080\n#### 1,080"},
        ("How much?", "1080", None),
    ),
    "arc_challenge": (
        {"id": "Q_1", "question": "The sun is?", "choices": FOUR, "answerKey": "A"},
        ("The sun is?", "A", READ),
    ),
    "openbookqa": (
        {"id": "7-9 ", "question_stem ": "The sun is", "choices": FOUR, "answerKey": " a "},
        ("The sun is", "A", READ),
    ),
    "strategyqa": (
        {"qid": "2bc", "question": "Is it hot? ", "answer": True, "facts": "Not shown."},
        ("Is it hot?", "yes", None),
    ),
    "medqa": (
        {
            "question": "What is it?",
            "options": {"A": 'Flu\n"', "B": "Cold  ", "C": '"""Go home."""', "D": "5'-UCA-3'"},
            "answer_idx": "B",
            "answer": "Cold",
        },
        ("What is it?", "B", {"A": "Flu", "B": "Cold", "C": '"Go home."', "D": "5'-UCA-3'"}),
    ),
    "word_problems": (
        {"question": "How many?", "answer": 3},
        ("How many?", "3", None),
    ),
}


def test_every_task_that_reads_rows_is_tried_here():
    assert TASKS.keys() - ROWS.keys() == {"miniature"}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_prompt(name):
    row, expected = ROWS[name]
    prompt = TASKS[name].prompt(row)
    assert (prompt.question, prompt.gold, prompt.choices) == expected
    assert prompt.kind == TASKS[name].kind


@pytest.mark.parametrize("name", ["arc_challenge", "openbookqa", "medqa"])
@pytest.mark.parametrize("write", [json.dumps, str])
def test_a_nested_column_may_be_written_as_text(name, write):
    row, _ = ROWS[name]
    flat = {key: write(value) if isinstance(value, dict) else value for key, value in row.items()}
    assert TASKS[name].prompt(flat) == TASKS[name].prompt(row)


def test_a_prompt_keeps_the_id_of_its_row_or_gets_a_stable_one():
    gsm8k, arc = TASKS["gsm8k"], TASKS["arc_challenge"]
    row, other = ROWS["gsm8k"][0], {"question": "How many?", "answer": "#### 3"}
    assert arc.prompt(ROWS["arc_challenge"][0]).prompt_id == "Q_1"
    assert TASKS["openbookqa"].prompt(ROWS["openbookqa"][0]).prompt_id == "7-9"
    assert TASKS["strategyqa"].prompt(ROWS["strategyqa"][0]).prompt_id == "2bc"
    assert gsm8k.prompt(row | {"id": 0}).prompt_id == "0"
    assert gsm8k.prompt(row | {"id": ""}).prompt_id == gsm8k.prompt(row).prompt_id
    assert gsm8k.prompt(row).prompt_id == "fe85a9237a9feb324055959115b0eb32"
    assert gsm8k.prompt(other).prompt_id != gsm8k.prompt(row).prompt_id


def test_options_of_any_number_and_label():
    arc = TASKS["arc_challenge"]
    for labels in (["A", "B", "C"], ["1", "2", "3", "4", "5"]):
        choices = {"text": [f"option {label}" for label in labels], "label": labels}
        row = {"question": "Which?", "choices": choices, "answerKey": labels[-1]}
        prompt = arc.prompt(row)
        assert list(prompt.choices or ()) == labels
        assert prompt.gold == labels[-1]


def test_an_option_that_another_row_has_is_not_read():
    row = {"question": "Q?", "options": {"A": "x", "B": "y", "E": None}, "answer_idx": "A"}
    assert TASKS["medqa"].prompt(row).choices == {"A": "x", "B": "y"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gsm8k", {"answer": None}, "no answer .*expects question, answer: rename"),
        ("gsm8k", {"answer": "no idea"}, "gold answer is 'no idea', expected a number"),
        ("gsm8k", {"question": " "}, "question is empty"),
        ("arc_challenge", {"answerKey": ""}, "gold answer is '', expected one of the labels A, B"),
        ("arc_challenge", {"answerKey": "E"}, "gold answer is 'E'"),
        ("arc_challenge", {"choices": "a star"}, "'a star', which is no JSON object"),
        ("arc_challenge", {"choices": "[1]"}, "expected an object"),
        ("arc_challenge", {"choices": {"text": ["x"], "label": ["A", "B"]}}, "of one length"),
        ("arc_challenge", {"choices": {"text": ["x", "y"], "label": ["A", "A"]}}, "no label twice"),
        ("strategyqa", {"answer": "perhaps"}, "expected yes or no"),
        ("medqa", {"options": None}, "no options"),
        ("chat", {"prompt": None}, "no prompt or question or conversations .the row has prompt"),
        ("chat", {"prompt": " "}, "question is empty"),
        ("chat", {"prompt": ["Hello"]}, r"prompt is \['Hello'\], expected a text"),
        ("chat", {"prompt": None, "conversations": "Hello"}, "'Hello', which is no JSON"),
        ("chat", {"prompt": None, "conversations": ["Hello"]}, "expected turns such as"),
    ],
)
def test_a_row_that_cannot_be_used(name, change, message):
    with pytest.raises(BadInputError, match=message):
        TASKS[name].prompt(ROWS[name][0] | change)


def test_the_message_is_question_options_instruction():
    prompt = Prompt("1", "Which?", "choice", "B", {"A": "dry palms", "B": "wet palms"})
    assert user_message(prompt) == (
        "Which?\nA. dry palms\nB. wet palms\n\n"
        "Reason step by step, then give the letter of the right option in \\boxed{}."
    )


def test_the_instruction_of_each_kind():
    end = "in \\boxed{}."
    assert instruct("Q?", "number") == (
        f"Q?\n\nReason step by step, then give the final answer {end}"
    )
    assert instruct("Q?", "boolean").endswith(f"give the final answer, yes or no, {end}")
    assert instruct("Q?", "choice").endswith(f"give the letter of the right option {end}")
    numbered = instruct("Q?", "choice", {"1": "x", "2": "y"})
    assert "\n1. x\n2. y\n\n" in numbered
    assert numbered.endswith(f"give the number of the right option {end}")


def test_an_open_question_stands_alone():
    prompt = TASKS["chat"].prompt({"question": "Write a poem."})
    assert (prompt.kind, user_message(prompt)) == ("open", "Write a poem.")


@pytest.mark.parametrize("write", [lambda turns: turns, json.dumps, str])
def test_the_first_turn_of_a_human_is_the_prompt(write):
    turns = [{"from": "human", "value": " Hi. "}, {"from": "gpt", "value": "Hello!"}]
    prompt = TASKS["chat"].prompt({"id": "QWJhYvA_0", "conversations": write(turns)})
    assert prompt.question == "Hi."
    other = TASKS["chat"].prompt({"id": "other", "conversations": write(turns)})
    assert other.prompt_id == prompt.prompt_id  # the id names the dialogue and not the prompt


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Hi."}],
        [{"from": "system", "value": "Be kind."}],
        [{"from": "human", "value": ""}],
        [{"from": "human", "value": None}],
        [{"value": "Hi."}],
    ],
)
def test_a_dialogue_that_no_human_starts_is_skipped(turns):
    assert TASKS["chat"].prompt({"conversations": turns}) is None


def test_an_open_row_may_carry_a_reference_and_tests():
    row = {"prompt": "Double it.", "gold": {"a": "ü"}, "tests": "assert f(1) == 2"}
    prompt = TASKS["chat"].prompt(row)
    assert (prompt.gold, prompt.tests) == ('{"a": "ü"}', "assert f(1) == 2")
    bare = TASKS["chat"].prompt(row | {"gold": " ", "tests": None})
    assert (bare.gold, bare.tests) == (None, None)


def test_the_message_says_nothing_of_the_gold():
    for gold in ("A", "B"):
        prompt = Prompt("1", "Which?", "choice", gold, {"A": "x", "B": "y"})
        assert user_message(prompt) == instruct("Which?", "choice", {"A": "x", "B": "y"})


def words(split, seed=0, **options) -> list[Prompt]:
    return load_prompts(Section(name="word_problems", **options), split, seed)


def test_the_parts_of_the_word_problems_share_nothing_and_are_all():
    parts = [words(split) for split in ("train", "validation", "test")]
    questions = [prompt.question for part in parts for prompt in part]
    assert len(questions) == len(set(questions)) == 8 * 6 * (9 * 8**2 + 3 * 36)
    assert [round(len(part) / len(questions), 2) for part in parts] == [0.8, 0.1, 0.1]
    assert len({prompt.prompt_id for part in parts for prompt in part}) == len(questions)


def test_word_problems_are_seeded_and_a_larger_number_adds_to_a_smaller():
    assert words("train", 1, train_prompts=20) == words("train", 1, train_prompts=50)[:20]
    assert words("train", 1, train_prompts=20) != words("train", 2, train_prompts=20)
    assert words("test", 1, test_prompts=5) == words("test", 1, train_prompts=3)[:5]


def test_word_problems_have_the_answer_that_their_operands_give():
    signs = {"gets": "+", "finds": "+", "adds": "+", "gives": "-", "lost": "-", "takes": "-"}
    signs |= {"bags with": "*", "days": "*", "shelves": "*"}
    signs |= {"boxes": "/", "friends": "/", "fill": "/"}
    seen = set()
    for prompt in words("validation"):
        word = next(word for word in signs if word in prompt.question)
        first, second = re.findall(r"\d+", prompt.question)
        assert eval(f"{first}{signs[word]}{second}") == int(prompt.gold), prompt
        seen.add(word)
    assert seen == signs.keys()


def test_the_largest_operand_sets_the_numbers():
    small, large = (
        words("test", largest_operand=3),
        words("train", largest_operand=40, train_prompts=300),
    )
    assert max(int(prompt.gold) for prompt in small) == 9
    assert max(int(prompt.gold) for prompt in large) > 1000
    for largest in (1, 100):
        with pytest.raises(BadInputError, match=f"largest_operand={largest}, expected 2 to 99"):
            words("test", largest_operand=largest)


def test_the_chat_recipe_finds_its_prompts_in_as_many_as_the_paper_has(tmp_path):
    """ShareGPT has 49,839, all in one part."""
    rows = (json.dumps({"prompt": f"Tell me of {number}."}) for number in range(49_839))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    recipe = Path(__file__).parents[1] / "configs/dadpo.yaml"
    section = load_recipe(recipe, [f"task.data={tmp_path}"])[0].task
    found = {split: len(load_prompts(section, split, 0)) for split in ("train", "test")}
    assert found == {"train": 39_000, "test": 300}


def test_the_largest_operand_is_for_no_problems_that_are_read(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    mistakes = [
        ({"name": "sudoku"}, "'sudoku' is no task"),
        ({"name": "miniature"}, r"largest_operand=5 is for .*: set it to null"),
        ({"name": "gsm8k", "data": str(tmp_path)}, r"largest_operand=5 is for .*: set it to null"),
    ]
    for options, told in mistakes:
        with pytest.raises(BadInputError, match=told):
            load_prompts(Section(largest_operand=5, **options), "test", 0)


def test_more_word_problems_than_there_are():
    there = len(words("test"))
    assert len(words("test", test_prompts=there)) == there
    with pytest.raises(BadInputError, match=f"{there + 1} prompts asked .* has {there}"):
        words("test", test_prompts=there + 1)


def test_a_task_that_is_none():
    with pytest.raises(BadInputError, match="'gsm9k' is no task, expected one of arc_challenge"):
        load_prompts(Section(name="gsm9k"), "train", 0)
