"""The store of samples: content-addressed, shared by all runs, and never sampled into twice.

A file counts once its marker, written after it, is there and names its digest. A file that does
not match its marker is set aside, and its samples are simply missing again.
"""

import io
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.progress import say
from cluster.storage import digest_file, write_text
from pipeline.rows import SAMPLE_SCHEMA, Sample, from_table, to_table

_MARKER = ".ok"
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class SampleStore:
    """Samples in `root`, a local path or a URL, one folder for each model that wrote them."""

    root: UPath

    def write(self, samples: Iterable[Sample], note: Mapping[str, str] | None = None) -> None:
        """Add samples of one model as one new file, whole or not at all, and a note in it."""
        table = to_table(Sample, samples).replace_schema_metadata(note)
        if not len(table):
            return
        folder = self._folder(table["model"][0].as_py())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.parquet"
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        path.write_bytes(buffer.getvalue())
        write_text(_marker(path), digest_file(path))

    def keys(self, model: str) -> set[str]:
        """Keys of all samples that `model` has written."""
        return {key for table in self._tables(model, ["key"]) for key in table["key"].to_pylist()}

    def notes(self, model: str) -> Iterator[dict[str, str]]:
        """The notes in the files of `model`, one a file; those without any give an empty one."""
        for table in self._tables(model, ["key"]):
            found = table.schema.metadata or {}
            yield {name.decode(): value.decode() for name, value in found.items()}

    def read(self, model: str, keys: set[str]) -> dict[str, Sample]:
        """The samples of `model` with these keys; missing ones are left out."""
        wanted = pa.array(sorted(keys), pa.string())
        found = {}
        for table in self._tables(model, None):
            chosen = table.filter(pa.compute.is_in(table["key"], value_set=wanted))
            found.update({row.key: row for row in from_table(Sample, chosen)})
        return found

    def _folder(self, model: str) -> UPath:
        return self.root / "samples" / model

    def _tables(self, model: str, columns: list[str] | None) -> Iterable[pa.Table]:
        folder = self._folder(model)
        if not folder.exists():
            return
        names = {path.name for path in folder.iterdir()}
        for name in sorted(names):
            if name.endswith(".parquet") and name + _MARKER in names:
                if (folder / name).stat().st_size and _is_whole(folder / name):
                    yield _read(folder / name, columns)
                else:
                    _set_aside(folder / name)


def _read(path: UPath, columns: list[str] | None) -> pa.Table:
    table = pq.read_table(path.path, filesystem=path.fs, columns=columns)
    return table if columns else table.cast(SAMPLE_SCHEMA)


def _is_whole(path: UPath) -> bool:
    return digest_file(path) == _marker(path).read_text().strip()


def _set_aside(path: UPath) -> None:
    say(f"{path} is damaged: set aside, its samples will be drawn again")
    _marker(path).unlink()
    path.rename(path.with_name(path.name + _DAMAGED))


def _marker(path: UPath) -> UPath:
    return path.with_name(path.name + _MARKER)
