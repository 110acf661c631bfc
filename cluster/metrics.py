"""The lines of metrics.jsonl: appended whole, read without those that were cut short."""

import json
import os
import time
from collections.abc import Sequence
from math import inf
from typing import Any

from upath import UPath

from cluster.progress import say
from cluster.storage import is_local, writing

_BUCKET_S = 5.0


class StepLog:
    """The figures of training steps on their way to the file, which one process writes at a time.

    On a disk each is there at once. In a bucket, where a file grows only by being written anew,
    they wait for some seconds, at most until the end of the block that the log is used in. Call
    `write` before what comes of these steps is published: then a kill loses only lines of steps
    that are taken again.
    """

    def __init__(self, file: UPath) -> None:
        self._file, self._interval_s = file, 0.0 if is_local(file) else _BUCKET_S
        self._waiting: list[dict[str, Any]] = []
        self._written = -inf

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def add(self, **values: Any) -> None:
        """Take a line, and write all that wait if they do so for long."""
        self._waiting.append(values)
        if time.monotonic() - self._written >= self._interval_s:
            self.write()

    def write(self) -> None:
        """Write the lines that wait."""
        if self._waiting:
            append_records(self._file, self._waiting)
            self._waiting.clear()
            self._written = time.monotonic()


def append_records(file: UPath, records: Sequence[dict[str, Any]]) -> None:
    """Append lines of JSON to a file."""
    with writing(file):
        start = "\n" if _ends_in_half_a_line(file) else ""
        with file.open("a") as stream:
            stream.write(start + "".join(json.dumps(values) + "\n" for values in records))


def read_records(file: UPath) -> list[dict[str, Any]]:
    """The lines of a file, without those that a full disk or a kill cut short."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    found = [record for line in lines if (record := _record(line)) is not None]
    if broken := len(lines) - len(found):
        say(f"{file}: {broken} line(s) are damaged and left out")
    return found


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _ends_in_half_a_line(path: UPath) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"
