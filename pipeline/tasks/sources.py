"""Reading raw rows: from a local file or folder, or from the Hugging Face hub.

Local files are read here and not by `datasets`, which makes dates of texts, numbers of a CSV's
labels, a copy of every file in its cache, and cannot name the line of a mistake.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from upath import UPath

from cluster.errors import BadInputError
from cluster.storage import location, read_table
from pipeline.tasks.task import Row, Split

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}

Located = Iterator[tuple[str, Row]]  # (where, row): "test.jsonl line 3"


def find_files(data: str) -> dict[Split, list[UPath]]:
    """The files of each split of a local file or folder; a single file counts as train.

    Raises BadInputError where there is none of a known format and name.
    """
    path = location(data)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise BadInputError(
                f"task.data={data} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}"
            )
        return {"train": [path]}
    if not path.is_dir():
        raise BadInputError(
            f"task.data={data}: nothing is at {path}; give a JSONL, JSON, CSV or Parquet file, a "
            "folder of train, validation and test files, or the id of a Hugging Face data set"
        )
    found: dict[Split, list[UPath]] = {}
    for file in sorted(path.iterdir(), key=str):
        split = _SPLIT_NAMES.get(re.split(r"[._-]", file.name)[0].lower())
        if split is not None and file.suffix in SUFFIXES:
            found.setdefault(split, []).append(file)
    if not found:
        names = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        raise BadInputError(
            f"task.data={data} has no data: expected files such as train.jsonl and test.parquet, "
            f"got {names}"
        )
    return found


def looks_local(data: str) -> bool:
    """Whether `data` is meant as a path or URL: it exists, or cannot be the id of a data set."""
    return (
        location(data).exists()
        or data.endswith(SUFFIXES)
        or data.startswith((".", "/", "~"))
        or data.count("/") > 1
    )


def read_file(path: UPath) -> Located:
    """The rows of one file, each with where it stands."""
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        # By hand and not with `splitlines`: texts hold U+2028 and other separators of their own.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 ({error}): convert it") from None
    if path.suffix == ".csv":
        return _read_csv(path, text)
    if text.lstrip().startswith("["):
        return _read_json_list(path, text)
    return _read_json_lines(path, text)


def _read_json_lines(path: UPath, text: str) -> Located:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _object(_json(line, where), where)


def _read_json_list(path: UPath, text: str) -> Located:
    for number, row in enumerate(_json(text, str(path)), start=1):
        where = f"{path} item {number}"
        yield where, _object(row, where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInputError(
            f"{where} is not JSON ({error}): expected one object a line, or a list of objects"
        ) from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise BadInputError(f"{where} is {str(value)[:40]!r}, expected an object with columns")
    return value


def _read_csv(path: UPath, text: str) -> Located:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row:
                raise BadInputError(
                    f"{where} has more cells than the header: quote cells that hold a comma"
                )
            yield where, row
    except csv.Error as error:
        raise BadInputError(f"{path} line {reader.line_num} is not CSV: {error}") from None


def _read_parquet(path: UPath) -> Located:
    try:
        table = read_table(path)
    except pa.ArrowInvalid as error:
        raise BadInputError(f"{path} is not a Parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path} row {number}", row


def read_hub(hub_id: str, config: str | None) -> dict[Split, Located]:
    """The splits of a data set of the hub. Raises BadInputError where it cannot be had."""
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise BadInputError(
            f"{hub_id} could not be loaded from the Hugging Face hub ({error}), and no file or "
            "folder of that name is here: check the name and the network, or set task.data to a "
            "local JSONL, JSON, CSV or Parquet file, or a folder of train, validation and test"
        ) from error
    found = {_SPLIT_NAMES[name]: rows for name, rows in loaded.items() if name in _SPLIT_NAMES}
    if not found:
        raise BadInputError(
            f"{hub_id} has the splits {', '.join(loaded)}, expected train, validation or test"
        )
    return {split: _located(f"{hub_id} {split}", rows) for split, rows in found.items()}


def _located(source: str, rows: Any) -> Located:
    for number, row in enumerate(rows, start=1):
        yield f"{source} row {number}", row
