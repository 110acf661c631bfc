"""Loading a task's prompts from files of every format, from folders, and from the hub."""

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import BadInputError
from cluster.sections import Task as Section
from pipeline.tasks import load_prompts
from pipeline.tasks.splits import part_of

SPLITS = ("train", "validation", "test")


def gsm8k_rows(count: int, first: int = 0) -> list[dict]:
    numbers = range(first, first + count)
    return [{"question": f"What is {n} + 0?", "answer": f"easy\n#### {n}"} for n in numbers]


def arc_rows(count: int) -> list[dict]:
    choices = {"text": ["x, y", 'a "z"', "w"], "label": ["1", "2", "3"]}
    return [
        {
            "id": f"00{n}",
            "question": f"Which\n{n}?",
            "choices": choices,
            "answerKey": str(n % 3 + 1),
        }
        for n in range(count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=rows[0])
            writer.writeheader()
            flat = [{k: _cell(value) for k, value in row.items()} for row in rows]
            writer.writerows(flat)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, dict) else value


def load(data: Path, split="train", name="gsm8k", seed=0, **options):
    return load_prompts(Section(name=name, data=str(data), **options), split, seed)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, suffix):
    rows = arc_rows(30)
    file = write(tmp_path / f"rows{suffix}", rows)
    prompts = load(file, "all", "arc_challenge")
    assert {prompt.prompt_id for prompt in prompts} == {row["id"] for row in rows}
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    assert by_id["007"].question == "Which\n7?"
    assert by_id["007"].gold == "2"
    assert by_id["007"].choices == {"1": "x, y", "2": 'a "z"', "3": "w"}


def test_texts_come_back_with_the_separators_that_are_theirs(tmp_path):
    question = "A box.\u2028How many\u0085 are\x0b in\x0c it?"
    row = {"question": question, "answer": "#### 3"}
    for name in ("one.jsonl", "two.csv"):
        file = write(tmp_path / name, [row, *gsm8k_rows(3)])
        assert question in [prompt.question for prompt in load(file, "all")]


def test_a_file_with_a_mark_windows_line_ends_and_blank_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in gsm8k_rows(4)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert len(load(file, "all")) == 4


def test_a_single_file_is_carved_by_the_problems_and_nothing_is_lost(tmp_path):
    rows = gsm8k_rows(400)
    parts = {split: load(write(tmp_path / "a.jsonl", rows), split) for split in SPLITS}
    questions = [prompt.question for split in SPLITS for prompt in parts[split]]
    assert sorted(questions) == sorted(row["question"] for row in rows)
    assert all(20 <= len(parts[split]) <= 60 for split in ("validation", "test"))
    shuffled = write(tmp_path / "b.csv", rows[::-1])
    assert all(load(shuffled, split) == parts[split] for split in SPLITS)


def test_too_many_prompts_asked_of_a_carved_file_say_what_was_set_aside(tmp_path):
    file = write(tmp_path / "a.jsonl", gsm8k_rows(20))
    left = len(load(file, "train"))
    with pytest.raises(BadInputError) as refused:
        load(file, train_prompts=20)
    assert f"(train), without those set aside as validation and test, which has {left}" in str(
        refused.value
    )


def test_a_problem_stays_in_its_part_when_rows_are_added(tmp_path):
    before = write(tmp_path / "a.jsonl", gsm8k_rows(100))
    after = write(tmp_path / "b.jsonl", gsm8k_rows(300))
    for split in SPLITS:
        assert set(load(before, split)) <= set(load(after, split))


def test_a_small_file_still_has_three_parts(tmp_path):
    for count in (3, 5):
        for first in range(20):
            file = write(tmp_path / "a.jsonl", gsm8k_rows(count, first))
            parts = [load(file, split) for split in SPLITS]
            assert all(parts)
            assert sum(map(len, parts)) == count
    file = write(tmp_path / "a.jsonl", gsm8k_rows(1))
    with pytest.raises(BadInputError, match=r"\(test\) has no prompts, got train 1, validation 0"):
        load(file, "test")


def test_a_folder_keeps_its_own_parts_and_carves_those_it_lacks(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", gsm8k_rows(100))
    write(tmp_path / "train-00001-of-00002.parquet", gsm8k_rows(100, 100))
    write(tmp_path / "dev.jsonl", gsm8k_rows(7, 200))
    (tmp_path / "README.md").write_text("not data")
    train, validation, test = (load(tmp_path, split) for split in SPLITS)
    assert {prompt.gold for prompt in validation} == {str(n) for n in range(200, 207)}
    assert len(train) + len(test) == 200
    assert test
    assert not set(train) & set(test)


def test_a_folder_with_nothing_but_a_test_part(tmp_path):
    write(tmp_path / "test.jsonl", gsm8k_rows(5))
    assert len(load(tmp_path, "test")) == len(load(tmp_path, "all")) == 5
    with pytest.raises(BadInputError, match=r"\(train\) has no prompts, got .*test 5"):
        load(tmp_path, "train")


def test_what_repeats_a_train_problem_is_left_out_and_counted(tmp_path, capsys):
    rows = arc_rows(6)
    again = {
        "id": "again",
        "question": rows[0]["question"].upper(),
        "choices": {"text": ["w", "X, y", 'a "z"'], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    other = rows[0] | {"id": "other", "choices": {"text": ["p", "q"], "label": ["1", "2"]}}
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", [again, other | {"answerKey": "1"}])
    test = load(tmp_path, "test", "arc_challenge")
    assert [prompt.prompt_id for prompt in test] == ["other"]
    assert "left out 1 prompts that repeat another part's" in capsys.readouterr().out


def test_the_first_of_a_seeded_permutation(tmp_path):
    file = write(tmp_path / "a.jsonl", gsm8k_rows(100))
    ten, thirty = load(file, train_prompts=10), load(file, train_prompts=30)
    assert ten == thirty[:10]
    assert ten != load(file, seed=1, train_prompts=10)
    assert thirty == load(file)[:30]
    with pytest.raises(BadInputError, match=r"101 prompts asked of .* \(all\), which has 100"):
        load(file, "all", test_prompts=101)


def test_rows_without_ids_that_are_the_same_count_once(tmp_path):
    file = write(tmp_path / "a.jsonl", gsm8k_rows(5) + gsm8k_rows(2))
    assert len(load(file, "all")) == 5


def dialogue(first: str, start: str = "human") -> dict:
    turns = [{"from": start, "value": first}, {"from": "gpt", "value": "Well."}]
    return {"id": f"{first}_0", "conversations": turns}


def test_dialogues_are_taken_once_and_those_of_no_human_counted(tmp_path, capsys):
    rows = [dialogue("Hi."), dialogue("Bye."), dialogue("Hi."), dialogue("On.", "gpt")]
    rows[2]["id"] = "another"
    file = write(tmp_path / "a.jsonl", rows)
    assert {prompt.question for prompt in load(file, "all", "chat")} == {"Hi.", "Bye."}
    line = "left out 1 dialogues that do not start with words of a human"
    assert capsys.readouterr().out.count(line) == 1


def test_a_file_of_dialogues_that_no_human_starts_is_empty(tmp_path):
    file = write(tmp_path / "a.jsonl", [dialogue("On.", "gpt")])
    with pytest.raises(BadInputError, match="expected rows with prompt or question or conversa"):
        load(file, "all", "chat")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty: expected rows with question, answer"),
        ("a.csv", "question,answer\n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", '{"question": "Q?", "answer": "1"}\n{"question', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", '"text"', "line 1 is 'text', expected an object"),
        ("a.json", '[{"question": "Q?"}]', "has no column answer, got question; gsm8k expects"),
        ("a.csv", "q,answer\nQ?,1\n", "has no column question, got answer, q; gsm8k"),
        ("a.csv", "question,answer\nQ?,1,2\n", "line 2 has more cells than the header"),
        ("a.jsonl", '{"question": "Q?", "answer": "I give up"}', "line 1: the gold answer is 'I g"),
        ("a.parquet", "no such thing", "is not a Parquet file"),
        ("a.txt", "question", r"ends in '.txt', expected one of .jsonl"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInputError, match=message):
        load(file)


def test_an_id_twice(tmp_path):
    rows = arc_rows(3)
    rows[2]["id"] = "000"
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        BadInputError, match=r"line 3: has the id '000' of .*line 1, and another problem: give"
    ):
        load(file, name="arc_challenge")


def test_one_row_in_a_hundred_may_be_unusable_and_the_user_is_told(tmp_path, capsys):
    rows = gsm8k_rows(199)
    rows[7]["answer"] = "I see."
    assert len(load(write(tmp_path / "a.jsonl", [*rows, {"question": " "}]), "all")) == 198
    told = capsys.readouterr().out
    assert "left out 2 of 200 rows: 1 with no usable gold answer, 1 with no answer (first:" in told
    assert re.search(r"a.jsonl line 8: the gold answer is 'I see\.'.*; .*line 200: no answer", told)
    with pytest.raises(BadInputError, match="3 of 201 rows cannot be used, more than task"):
        load(write(tmp_path / "a.jsonl", [*rows, {"question": " "}, {"answer": "#### 1"}]), "all")


def test_the_same_problem_with_another_gold_answer_is_a_fault(tmp_path):
    rows = gsm8k_rows(3)
    file = write(tmp_path / "a.jsonl", [*rows, rows[0] | {"answer": "#### 8"}])
    assert len(load(file, "all", max_error_share=0.25)) == 3
    with pytest.raises(BadInputError, match=r"answer is '8', and '0' at .*line 1, which has"):
        load(file, "all", max_error_share=0.2)


def test_places_where_nothing_is(tmp_path):
    for missing in (tmp_path / "nothing.jsonl", tmp_path / "nothing", Path("nowhere.csv")):
        with pytest.raises(BadInputError, match=r"nothing is at .*; give a JSONL"):
            load(missing)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(BadInputError, match=r"such as train.jsonl and test.parquet, got notes.txt"):
        load(tmp_path)


def test_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        splits = {"train": gsm8k_rows(50), "test": gsm8k_rows(5, 50), "extra": [{"no": 1}]}
        return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    own, foreign = Section(name="gsm8k"), Section(name="gsm8k", data="somebody/sums")
    assert {prompt.gold for prompt in load_prompts(own, "test", 0)} == {
        str(n) for n in range(50, 55)
    }
    assert len(load_prompts(own, "train", 0)) + len(load_prompts(own, "validation", 0)) == 50
    load_prompts(foreign, "train", 0)
    assert set(asked) == {("openai/gsm8k", "main"), ("somebody/sums", None)}


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError, RuntimeError])
def test_a_hub_that_fails(monkeypatch, error):
    import datasets

    def load_dataset(*arguments):
        raise error("out of reach")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"somebody/sums could not be loaded .*out of reach.*set task.data to a local JSONL"
    with pytest.raises(BadInputError, match=message):
        load(Path("somebody/sums"))


def test_a_hub_without_known_splits(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: {"all": []})
    with pytest.raises(BadInputError, match="has the splits all, expected train, validation"):
        load(Path("somebody/sums"))


def test_local_files_need_no_datasets_library_and_no_network(tmp_path, monkeypatch):
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert len(load(write(tmp_path / "a.csv", gsm8k_rows(9)), "all")) == 9


def test_the_shares_of_carved_parts_follow_the_key():
    assert part_of("0" * 32) == "test"
    assert part_of("1" + "f" * 31) == "validation"
    assert part_of("4" + "0" * 31) == "train"
