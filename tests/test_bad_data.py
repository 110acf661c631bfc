"""Data that cannot be used: faults of a file end the run, those of single rows are counted."""

import json
import re
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

GOOD = {"question": "How many pens?", "answer": "#### 3"}
OPTIONS = {"text": ["dry", "wet"], "label": ["A", "B"]}


def packed(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.jsonl", json.dumps(GOOD))


def parquet(cut=None, damaged=False):
    def write(file):
        pq.write_table(pa.Table.from_pylist([GOOD] * 999), file, use_dictionary=False)
        content = file.read_bytes()[:cut]
        file.write_bytes(content[:20] + b"\xff" * 40 + content[60:] if damaged else content)

    return write


# name of the file -> what to write there, and the words of the error
FILES = {
    "UTF-16": ("a.jsonl", json.dumps(GOOD).encode("utf-16"), "not UTF-8 .*convert it"),
    "Latin-1": ("a.csv", "question,answer\nFür wen?,1\n".encode("latin-1"), "not UTF-8 .*iconv"),
    "an archive": ("a.jsonl", packed, "a.jsonl is a zip archive, expected text: unpack it"),
    "a name of no format": ("a.zip", packed, "ends in '.zip', expected one of .jsonl, .json, .csv"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08", "is packed by gzip, expected text: unpack it"),
    "zeros": ("a.jsonl", b"\0" * 99, "a.jsonl line 1 is not JSON .*bring the file anew"),
    "a line cut short": (
        "a.jsonl",
        f'{json.dumps(GOOD)}\n{{"question": "H',
        "a.jsonl line 2 is not JSON .*expected one object a line.* correct it",
    ),
    "one object": ("a.json", json.dumps({"rows": [GOOD]}), "no column question.*got rows.*rename"),
    "deep brackets": ("a.json", "[" * 99_999, "a.json is not JSON .*recursion.*correct it"),
    "an endless number": (
        "a.jsonl",
        '{"answer": ' + "9" * 5000 + "}",
        "line 1 is not JSON .*integer",
    ),
    "texts for rows": (
        "a.json",
        '["How many?"]',
        "item 1 is 'How many.', .*an object.*write",
    ),
    "a missing column": ("a.jsonl", '{"question": "Q?"}', "no column answer, got question.*rename"),
    "other columns": ("a.csv", "q,a\nHow?,1\n", "no column question, answer, got a, q.*rename"),
    "more cells": ("a.csv", "question,answer\nHow,?,1\n", "line 2 has more cells .*quote cells"),
    "an open quote": (
        "a.csv",
        'question,answer\n"How?,1\n',
        "line 1 is not CSV .*close the quotes",
    ),
    "a column twice": ("a.csv", "answer,answer\n1,2\n", "the column 'answer' twice: rename"),
    "nothing": ("a.jsonl", "", "is empty: expected rows with question, answer"),
    "a header alone": ("a.csv", "question,answer\n", "is empty: expected rows with question"),
    "half a Parquet file": ("a.parquet", parquet(cut=500), "not a Parquet file.*bring it anew"),
    "a damaged one": ("a.parquet", parquet(damaged=True), "not a whole one: bring it anew"),
    "no Parquet": ("a.parquet", b"", "not a Parquet file.*bring it anew"),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_fault_of_a_file_ends_the_run_before_it_starts(fault, recipe, refused):
    name, content, words = FILES[fault]
    file = recipe.parent / name
    if callable(content):
        content(file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("run", recipe, f"task.data={name}", "task.max_error_share=1")
    assert name in line
    assert re.search(words, line)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("empty", "has no data: expected files such as train.jsonl .*got nothing"),
        ("nowhere.csv", "nothing is at .*give a JSONL, JSON, CSV or Parquet file"),
        ("ftps://x/y.jsonl", "ftps://x/y.jsonl cannot be read .*give a path, or a URL"),
        ("''", "task.data='' is no name, path or URL: give one"),
    ],
)
def test_a_place_without_data(data, words, recipe, refused):
    (recipe.parent / "empty").mkdir()
    assert re.search(words, refused("run", recipe, f"task.data={data}"))


# task, what a row is changed to, and the words of the error
ROWS = {
    "an empty prompt": ("gsm8k", {"question": "  "}, "an empty question", "leave the row out"),
    "no prompt": ("gsm8k", {"question": None}, "no question", "leave out rows without"),
    "a prompt that is a list": ("gsm8k", {"question": ["How?"]}, "is no text", "expected a text"),
    "a prompt of 10 MB": ("gsm8k", {"question": "Why? " * 2_000_000}, "too long", "shorten it"),
    "a control character": ("gsm8k", {"question": "a\0b"}, "U[+]0000 as its character 2", "remove"),
    "half a character": ("gsm8k", {"question": "a\ud800"}, "control character U[+]D800", "remove"),
    "a gone gold": ("gsm8k", {"answer": None}, "no answer", "leave out rows without"),
    "no gold in an answer": ("gsm8k", {"answer": "I see."}, "answer is 'I see.'", "correct it"),
    "a gold without end": (
        "gsm8k",
        {"answer": "#### inf"},
        "is 'inf', expected a number",
        "correct",
    ),
    "a gold outside": ("arc_challenge", {"answerKey": "E"}, "one of the labels A, B", "correct it"),
    "one option": (
        "arc_challenge",
        {"choices": "{}"},
        "choices that cannot be read",
        "two options",
    ),
    "another's id": ("arc_challenge", {"id": "1"}, "the id '1' of .*line 2", "its own id"),
    "another gold": ("gsm8k", {"question": "How many 1?"}, "'99', and '1' at", "keep the right"),
    "neither yes nor no": ("strategyqa", {"answer": "perhaps"}, "expected yes or no", "correct it"),
}


def rows_of(task: str) -> list[dict]:
    if task == "arc_challenge":
        more = {"choices": OPTIONS, "answerKey": "A"}
        return [{"id": str(n), "question": f"Which {n}?", **more} for n in range(100)]
    answers = ["yes"] * 100 if task == "strategyqa" else [f"#### {n}" for n in range(100)]
    return [{"question": f"How many {n}?", "answer": answer} for n, answer in enumerate(answers)]


@pytest.mark.parametrize("fault", ROWS)
def test_faults_of_single_rows_are_counted_and_too_many_refused(fault, recipe, refused):
    task, change, what, todo = ROWS[fault]
    rows = rows_of(task)
    rows[99] |= change
    lines = [json.dumps(row) for row in rows]
    (recipe.parent / "a.jsonl").write_text("\n".join(lines))
    options = (f"task.name={task}", "task.data=a.jsonl")
    line = refused("run", recipe, *options, "task.max_error_share=0.009")
    assert "1 of 100 rows cannot be used, more than task.max_error_share=0.009 allows: 1 " in line
    assert "a.jsonl line 100: " in line
    assert re.search(what, line)
    assert todo in line
