"""Files by path or URL: where they lie, and how they are read and written whole."""

import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.credentials import refuse_credentials
from cluster.errors import BadInputError, OutOfReachError, RunError


def location(text: str) -> UPath:
    """A path or URL as one kind of object; file:// URLs and relative paths become absolute paths.

    Raises BadInputError for a URL with a password or a token in it, of an unknown protocol or of no
    place, and for an unknown user's home.
    """
    refuse_credentials("the place of a file or folder", text)
    try:
        # A cached listing would hide what another process has written since.
        path = UPath(text, use_listings_cache=False) if "://" in text else UPath(text).expanduser()
    except (ValueError, RuntimeError, ImportError) as error:
        raise BadInputError(
            f"{text} cannot be read ({error}): give a path, or a URL such as s3://bucket/folder"
        ) from None
    if "://" in text and not path.path.strip("/"):
        raise BadInputError(f"{text} names no place: give a URL such as s3://bucket/folder")
    return UPath(path.path).absolute() if is_local(path) else path


def check_reachable(option: str, place: UPath) -> None:
    """Raise BadInputError where the place that an option names cannot be asked what it holds."""
    out_of_reach: tuple[type[Exception], ...] = (*failures(), ValueError, ImportError)
    try:
        place.exists()
    except out_of_reach as error:
        kind = BadInputError if is_local(place) else OutOfReachError
        raise kind(
            f"{option}={place} cannot be read ({error}): check the URL, the credentials of this "
            "machine and its rights"
        ) from None


def check_writable(option: str, place: UPath) -> None:
    """check_reachable, and raise BadInputError where a local `place` can be no folder to write in.

    Nothing is written: a bucket tells only when it is written to.
    """
    if place.protocol in ("http", "https"):
        raise BadInputError(
            f"{option}={place} cannot be written: give a path, or the URL of a bucket such as "
            "s3://bucket/folder"
        )
    check_reachable(option, place)
    if not is_local(place):
        return
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir():
        raise BadInputError(
            f"{option}={place} cannot be a folder, as {there} is a file: give another one"
        )
    if not os.access(there.path, os.W_OK | os.X_OK):
        raise BadInputError(
            f"{option}={place} cannot be written, as {there} is not open to this user: give a "
            "folder of your own, or ask for the right to write there"
        )


def prove_writable(option: str, place: UPath) -> None:
    """Raise BadInputError where a file cannot be written in `place` and removed again."""
    file = place / f".trial-{uuid.uuid4().hex}"
    try:
        write_bytes(file, b"")
        file.unlink()
    except RunError as error:
        if getattr(error.__cause__, "errno", None) == ENOSPC:
            raise  # a full disk is no mistake of the user's
        raise BadInputError(
            f"{option}={place} cannot be written ({error.__cause__}): give another place, or the "
            "right to write there"
        ) from None


def failures() -> tuple[type[Exception], ...]:
    """What reading and writing raise where a disk, a bucket or the way to it fails."""
    from botocore.exceptions import BotoCoreError, ClientError

    return OSError, BotoCoreError, ClientError


@contextmanager
def writing(path: UPath) -> Iterator[None]:
    """Raise RunError, in one line, where the disk or the bucket does not take what is written."""
    from safetensors import SafetensorError

    refused: tuple[type[Exception], ...] = (*failures(), SafetensorError)
    try:
        yield
    except refused as error:
        raise RunError(
            f"{path} cannot be written ({error}): free space or mend the storage, then run the "
            "same command again; all that was saved before is kept"
        ) from error


def cache_folder() -> Path:
    """Where copies of remote files are kept: POTSTILL_CACHE, or ~/.cache/potstill."""
    return Path(os.environ.get("POTSTILL_CACHE") or Path.home() / ".cache" / "potstill")


def is_local(path: UPath) -> bool:
    """Whether `path` is on a file system of this machine."""
    return path.protocol in ("", "file", "local")


def write_json(path: UPath, value: object) -> bytes:
    """Write a JSON file whole, as write_bytes does. Returns its bytes."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: UPath, text: str) -> bytes:
    """Write a text file whole, as write_bytes does. Returns its bytes."""
    return write_bytes(path, text.encode())


def write_bytes(path: UPath, content: bytes) -> bytes:
    """Write a file; on a local disk it appears whole or not at all, as objects do in a bucket."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            path.write_bytes(content)
            return content
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            partial.write_bytes(content)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        return content


def create_text(path: UPath, text: str) -> bool:
    """Write a text file where there is none, else return False; of many at once, one writes.

    A kill or a full disk may leave it cut short where that is a local one.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if is_local(path):
                with path.open("xb") as stream:
                    stream.write(text.encode())
            else:
                path.fs.pipe_file(path.path, text.encode(), mode="create")
        except FileExistsError:
            return False
        return True


def read_json(path: UPath) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text())


def write_table(table: pa.Table, path: UPath) -> bytes:
    """Write a Parquet file whole, as write_bytes does. Returns its bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return write_bytes(path, buffer.getvalue())


def read_table(path: UPath) -> pa.Table:
    """Read a Parquet file, or all Parquet files of a folder in order of name.

    Raises BadInputError where it holds objects of Python.
    """
    files = sorted(path.glob("*.parquet"), key=str) if path.is_dir() else [path]
    return pa.concat_tables([read_parquet(file) for file in files])


def read_parquet(file: UPath, columns: list[str] | None = None) -> pa.Table:
    """Some columns, or all, of a Parquet file. Raises BadInputError for objects of Python in it."""
    table = pq.read_table(
        file.path, filesystem=file.fs, columns=columns, page_checksum_verification=True
    )
    return _without_objects(table, file)


def parse_parquet(content: bytes, file: UPath, columns: list[str] | None = None) -> pa.Table:
    """As `read_parquet`, of bytes that were read from `file` already."""
    source = pa.BufferReader(content)
    table = pq.read_table(source, columns=columns, page_checksum_verification=True)
    return _without_objects(table, file)


def _without_objects(table: pa.Table, file: UPath) -> pa.Table:
    # Where Ray Data is loaded, to look at a column of its type for objects unpickles them, and a
    # pickle can run code.
    objects = [field.name for field in table.schema if _is_extended(field.type)]
    if objects:
        raise BadInputError(
            f"{file} has columns of an extension type, {', '.join(objects)}: write them as texts, "
            "numbers, or lists of these"
        )
    return table


def _is_extended(kind: pa.DataType) -> bool:
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    return isinstance(kind, pa.ExtensionType) or any(map(_is_extended, inner))
