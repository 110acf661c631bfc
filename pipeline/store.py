"""The store of samples and scores: content-addressed, shared by all runs, nothing made twice.

A file counts once its marker, written after it, is there and names its digest. A file that does
not match its marker is set aside, and its rows are simply missing again.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa
from upath import UPath

from cluster.storage import digest_file, read_parquet, set_aside, write_table, write_text
from pipeline.rows import SCHEMAS, Sample, Score, from_table, to_table

_MARKER = ".ok"

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
        write_table(table, path)
        write_text(_marker(path), digest_file(path))

    def keys(self, model: str) -> set[str]:
        """Keys of all rows that `model` has."""
        return {key for table in self._tables(model, ["key"]) for key in table["key"].to_pylist()}

    def notes(self, model: str) -> Iterator[dict[str, str]]:
        """The notes in the files of `model`, one a file; those without any give an empty one."""
        for table in self._tables(model, ["key"]):
            found = table.schema.metadata or {}
            yield {name.decode(): value.decode() for name, value in found.items()}

    def read(self, model: str, keys: set[str]) -> dict[str, Stored]:
        """The rows of `model` with these keys; missing ones are left out."""
        wanted = pa.array(sorted(keys), pa.string())
        found: dict[str, Stored] = {}
        for table in self._tables(model, None):
            chosen = table.filter(pa.compute.is_in(table["key"], value_set=wanted))
            rows: list[Any] = from_table(self.row_type, chosen)
            found.update({row.key: row for row in rows})
        return found

    def _folder(self, model: str) -> UPath:
        return self.root / self.name / model

    def _tables(self, model: str, columns: list[str] | None) -> Iterable[pa.Table]:
        folder = self._folder(model)
        if not folder.exists():
            return
        names = {path.name for path in folder.iterdir()}
        for name in sorted(names):
            if name.endswith(".parquet") and name + _MARKER in names:
                if (folder / name).stat().st_size and _is_whole(folder / name):
                    yield self._read(folder / name, columns)
                else:
                    _marker(folder / name).unlink()
                    set_aside(folder / name)

    def _read(self, path: UPath, columns: list[str] | None) -> pa.Table:
        table = read_parquet(path, columns)
        return table if columns else table.cast(SCHEMAS[self.row_type])


class SampleStore(_Store[Sample]):
    """What models have written."""

    row_type, name = Sample, "samples"


class ScoreStore(_Store[Score]):
    """How likely models find given responses."""

    row_type, name = Score, "scores"


def _is_whole(path: UPath) -> bool:
    return digest_file(path) == _marker(path).read_text().strip()


def _marker(path: UPath) -> UPath:
    return path.with_name(path.name + _MARKER)
