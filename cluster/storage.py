"""Files and folders by path or URL: publishing them whole, proving them whole, bringing them near.

Object stores have no rename, so a folder counts only once its marker, written last, is there. The
marker lists each file's digest.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.credentials import refuse_credentials
from cluster.errors import BadInputError, OutOfReachError, RunError
from cluster.progress import say

MARKER = "PUBLISHED.json"
_CHUNK = 1 << 22
_STAGING = ".staging-"


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


def digest_file(path: Path | UPath) -> str:
    """BLAKE2b-128 of a file's bytes, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_text(*parts: str) -> str:
    """BLAKE2b-128 of strings, each with its length, so that no two lists of parts collide."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


@contextmanager
def publishing(target: UPath) -> Iterator[Path]:
    """A new empty folder to write files in; the end of the block publishes it at `target`."""
    with writing(target):
        staging = staging_folder(target)
        try:
            yield staging
            publish_folder(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def publish_folder(source: Path, target: UPath) -> None:
    """Move what is below `source` to `target`, then write the marker that makes it count.

    Afterwards `target` holds these files and no others, and `source` is gone.
    """
    discard_folder(target)  # of a try that was killed before its marker
    digests = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        if is_local(target):
            shutil.move(file, str(destination))
        else:
            with file.open("rb") as reader, destination.open("wb") as writer:
                shutil.copyfileobj(reader, writer, _CHUNK)
        digests[name] = digest_file(destination)
    write_json(target / MARKER, {"files": digests})
    shutil.rmtree(source)


def discard_staging(parent: UPath) -> None:
    """Remove the staging folders that a killed process left for targets in `parent`."""
    if is_local(parent):
        for leftover in Path(parent.path).glob(f"{_STAGING}*"):
            shutil.rmtree(leftover)


def is_published(folder: UPath) -> bool:
    """Whether `folder` was published whole."""
    return (folder / MARKER).exists()


def is_whole(folder: UPath) -> bool:
    """Whether a published folder still holds the bytes that it was published with."""
    try:
        return _holds(folder, _digests(folder, read_json(folder / MARKER)))
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _holds(folder: Path | UPath, digests: Mapping[str, str]) -> bool:
    try:
        return all(digest_file(folder / name) == digest for name, digest in digests.items())
    except FileNotFoundError:
        return False


def set_aside(path: UPath) -> None:
    """Rename a damaged file or folder, so that it is made again and can still be looked at."""
    say(f"{path} is damaged: set aside, what it held is made again")
    if path.is_dir():
        (path / MARKER).unlink(missing_ok=True)
    name = f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"
    path.fs.mv(path.path, path.with_name(name).path, recursive=True)


def staging_folder(target: UPath) -> Path:
    """A new empty folder to write files in, on `target`'s disk where that is local."""
    if is_local(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_STAGING, dir=str(target.parent)))
    return Path(tempfile.mkdtemp(prefix="potstill-"))


def discard_folder(folder: UPath) -> None:
    """Remove a folder and all below it, the marker first, so that it never counts half."""
    if not folder.exists():
        return
    (folder / MARKER).unlink(missing_ok=True)
    folder.fs.rm(folder.path, recursive=True)


def fetch_folder(source: UPath, cache: Path) -> Path:
    """A local path of a published folder: itself if it is local, else a verified copy in `cache`.

    Raises RunError where a downloaded file does not have the digest that its marker gives.
    """
    if is_local(source):
        return Path(source.path)
    marker = json.loads((source / MARKER).read_text())
    target = cache / digest_text(str(source), json.dumps(marker, sort_keys=True))
    digests = _digests(source, marker)
    if target.exists():
        if _holds(target, digests):
            return target
        shutil.rmtree(target)
    partial = cache / f"{target.name}.{uuid.uuid4().hex}"
    for name, digest in digests.items():
        file = partial / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as reader, file.open("wb") as writer:
            shutil.copyfileobj(reader, writer, _CHUNK)
        if digest_file(file) != digest:
            raise RunError(
                f"{source / name} is damaged: its digest is not the one it was saved with"
            )
    return settle(partial, target)


def _digests(source: UPath, marker: dict[str, Any]) -> dict[str, str]:
    """The files that a marker names, with their digests; none of them outside of the folder."""
    for name in marker["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise RunError(f"{source / MARKER} names {name!r}, which is no file of that folder")
    return marker["files"]


def settle(partial: Path, target: Path) -> Path:
    """Rename a finished folder to `target`; where another process was first, theirs stays."""
    try:
        partial.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(partial)
    return target


def write_json(path: UPath, value: object) -> None:
    """Write a JSON file; on a local disk it appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: UPath, text: str) -> None:
    """Write a text file; on a local disk it appears whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: UPath, content: bytes) -> None:
    """Write a file; on a local disk it appears whole or not at all, as objects do in a bucket."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            path.write_bytes(content)
            return
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            partial.write_bytes(content)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: UPath) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text())


def write_table(table: pa.Table, path: UPath) -> None:
    """Write a Parquet file; on a local disk it appears whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_bytes(path, buffer.getvalue())


def read_table(path: UPath) -> pa.Table:
    """Read a Parquet file, or all Parquet files of a folder in order of name.

    Raises BadInputError where it holds objects of Python.
    """
    files = sorted(path.glob("*.parquet"), key=str) if path.is_dir() else [path]
    return pa.concat_tables([read_parquet(file) for file in files])


def read_parquet(file: UPath, columns: list[str] | None = None) -> pa.Table:
    """Some columns, or all, of a Parquet file. Raises BadInputError for objects of Python in it.

    Where Ray Data is loaded, to look at a column of its type for objects unpickles them, and a
    pickle can run code.
    """
    table = pq.read_table(
        file.path, filesystem=file.fs, columns=columns, page_checksum_verification=True
    )
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
