"""The store of samples and scores: content-addressed, shared by all runs, nothing made twice.

A file counts once its marker, written last, is there and names its digest. A file that does not
match its marker is set aside, and its rows are simply missing again.

Which files there are is told by a ledger, where each is entered before its marker is written, so
that a bucket that lists late hides none. A listing is asked beside it, since conditional writes, by
which a ledger keeps what many write at once, are not known to every storage.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa
from upath import UPath

from cluster.ledger import Ledger
from cluster.marking import mark, marker_of, read_marked
from cluster.publishing import set_aside
from cluster.storage import parse_parquet, write_table
from pipeline.rows import SCHEMAS, Sample, Score, from_table, to_table

_LEDGER = "ledger"
_READERS = 16  # files on their way at once: a bucket takes as long for one as for many

Stored = TypeVar("Stored", Sample, Score)


@dataclass(frozen=True)
class _Store(Generic[Stored]):
    """Rows of one type in `root`, a local path or a URL: a folder for each model."""

    root: UPath
    row_type: ClassVar[type]
    name: ClassVar[str]

    def write(self, rows: Iterable[Stored], note: Mapping[str, str] | None = None) -> None:
        """Add rows of one model as one new file, whole or not at all, and a note in it."""
        table = to_table(self.row_type, rows).replace_schema_metadata(note)
        if not len(table):
            return
        folder = self._folder(table["model"][0].as_py())
        path = folder / f"{uuid.uuid4().hex}.parquet"
        content = write_table(table, path)
        _ledger(folder).add(path.name)
        mark(path, content)

    def keys(self, model: str) -> set[str]:
        """Keys of all rows that `model` has."""
        return {key for table in self._tables(model, ["key"]) for key in table["key"].to_pylist()}

    def notes(self, model: str) -> Iterator[dict[str, str]]:
        """The notes in the files of `model`, one a file; those without any give an empty one."""
        for table in self._tables(model, ["key"]):
            found = table.schema.metadata or {}
            yield {name.decode(): value.decode() for name, value in found.items()}

    def read(self, model: str, keys: set[str]) -> dict[str, Stored]:
        """The rows of `model` with these keys; missing ones are left out.

        Of two rows with one key, which two runs may draw at once, always the same one.
        """
        found: dict[str, Stored] = {}
        for table in self._tables(model, None):
            wanted = pa.array([key in keys for key in table["key"].to_pylist()], pa.bool_())
            rows: list[Any] = from_table(self.row_type, table.filter(wanted))
            for row in rows:
                found.setdefault(row.key, row)
        return found

    def _folder(self, model: str) -> UPath:
        return self.root / self.name / model

    def _tables(self, model: str, columns: list[str] | None) -> Iterator[pa.Table]:
        folder = self._folder(model)
        paths = [folder / name for name in _names(folder)]
        read, at_once = partial(self._table, columns=columns), 4 * _READERS
        with ThreadPoolExecutor(_READERS) as readers:
            for start in range(0, len(paths), at_once):  # the pool would run ahead through all
                tables = readers.map(read, paths[start : start + at_once])
                yield from (table for table in tables if table is not None)

    def _table(self, path: UPath, columns: list[str] | None) -> pa.Table | None:
        try:
            content = read_marked(path)
        except FileNotFoundError:  # not finished or set aside, whatever a listing says
            return None
        if content is None:
            marker_of(path).unlink(missing_ok=True)
            set_aside(path)
            return None
        table = parse_parquet(content, path, columns)
        return table if columns else table.cast(SCHEMAS[self.row_type])


class SampleStore(_Store[Sample]):
    """What models have written."""

    row_type, name = Sample, "samples"


class ScoreStore(_Store[Score]):
    """How likely models find given responses."""

    row_type, name = Score, "scores"


def _names(folder: UPath) -> list[str]:
    """Names of the files that may be there, in an order that files to come do not change."""
    names = [*_ledger(folder).read(), *sorted(_listed(folder))]
    return [name for name in dict.fromkeys(names) if name.endswith(".parquet")]


def _listed(folder: UPath) -> list[str]:
    try:
        return [PurePosixPath(path).name for path in folder.fs.ls(folder.path, detail=False)]
    except FileNotFoundError:
        return []


def _ledger(folder: UPath) -> Ledger:
    return Ledger(folder / _LEDGER)
