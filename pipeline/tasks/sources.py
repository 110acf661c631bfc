"""Reading raw rows: from a local file or folder, or from the Hugging Face hub.

Local files are read here and not by `datasets`, which makes dates of texts, numbers of a CSV's
labels, a copy of every file in its cache, and cannot name the line of a mistake.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from upath import UPath

from cluster.errors import BadInputError, OutOfReachError
from cluster.storage import check_reachable, location, read_table
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

_PACKED = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "packed by gzip"}
_LARGEST_CELL = (1 << 31) - 1  # a row with a cell that is too long is no fault of the file

Located = Iterator[tuple[str, Row]]  # (where, row): "test.jsonl line 3"


def find_files(data: str) -> dict[Split, list[UPath]]:
    """The files of each split of a local file or folder; a single file counts as train.

    Raises BadInputError where there is none of a known format and name.
    """
    path = location(data)
    there = path.exists()  # HTTP answers the other questions with an error where nothing is
    if there and path.is_file():
        if path.suffix not in SUFFIXES:
            raise BadInputError(
                f"task.data={data} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}"
            )
        return {"train": [path]}
    if not (there and path.is_dir()):
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
    """Whether `data` is meant as a path or URL: it exists, or cannot be the id of a data set.

    Raises BadInputError where a URL cannot be asked.
    """
    place = location(data)
    check_reachable("task.data", place)
    return (
        place.exists()
        or data.endswith(SUFFIXES)
        or data.startswith((".", "/", "~"))
        or data.count("/") > 1
    )


def read_file(path: UPath) -> Located:
    """The rows of one file, each with where it stands."""
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if path.suffix == ".csv":
        return _read_csv(path, text)
    if text.lstrip().startswith("["):
        return _read_json_list(path, text)
    return _read_json_lines(path, text)


def _read_text(path: UPath) -> str:
    content = path.read_bytes()
    for beginning, kind in _PACKED.items():
        if content.startswith(beginning):
            raise BadInputError(f"{path} is {kind}, expected text: unpack it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path} is not UTF-8 ({error}): convert it, such as by iconv -t UTF-8"
        ) from None


def _read_json_lines(path: UPath, text: str) -> Located:
    # By hand and not with `splitlines`: texts hold U+2028 and other separators of their own.
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
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{where} is not JSON ({error}): expected one object a line, or a list of objects, so "
            "correct it or bring the file anew"
        ) from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise BadInputError(
            f"{where} is {str(value)[:40]!r}, expected an object with columns: write one a line"
        )
    return value


def _read_csv(path: UPath, text: str) -> Located:
    csv.field_size_limit(_LARGEST_CELL)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_header(path, reader.fieldnames or ())
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row:
                raise BadInputError(
                    f"{where} has more cells than the header: quote cells that hold a comma"
                )
            yield where, row
    except csv.Error as error:
        raise BadInputError(
            f"{path} line {reader.line_num} is not CSV ({error}): close the quotes that a cell "
            "opens, and double those within"
        ) from None


def _check_header(path: UPath, names: Sequence[str]) -> None:
    plain = [name.strip() for name in names]
    if twice := [name for name in plain if plain.count(name) > 1]:
        raise BadInputError(
            f"{path} line 1 names the column {twice[0]!r} twice: rename or remove one of them"
        )


def _read_parquet(path: UPath) -> Located:
    try:
        table = read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(
            f"{path} is not a Parquet file, or not a whole one: bring it anew ({error})"
        ) from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path} row {number}", row


def read_hub(hub_id: str, config: str | None) -> dict[Split, Located]:
    """The splits of a data set of the hub. Raises OutOfReachError where it cannot be had."""
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise OutOfReachError(
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
