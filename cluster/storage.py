"""Files and folders by path or URL: publishing them whole, proving them whole, bringing them near.

Object stores have no rename, so a folder counts only once its marker, written last, is there. The
marker lists each file's digest.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.errors import BadInputError, RunError

MARKER = "PUBLISHED.json"
_CHUNK = 1 << 22
_STAGING = ".staging-"


def location(text: str) -> UPath:
    """A path or URL as one kind of object; relative paths become absolute.

    Raises BadInputError for a URL of an unknown protocol or no place, and an unknown user's home.
    """
    try:
        # A cached listing would hide what another process has written since.
        path = UPath(text, use_listings_cache=False) if "://" in text else UPath(text).expanduser()
    except (ValueError, RuntimeError, ImportError) as error:
        raise BadInputError(
            f"{text} cannot be read ({error}): give a path, or a URL such as s3://bucket/folder"
        ) from None
    if "://" in text and not path.path.strip("/"):
        raise BadInputError(f"{text} names no place: give a URL such as s3://bucket/folder")
    return path if path.protocol else path.absolute()


def check_reachable(option: str, place: UPath) -> None:
    """Raise BadInputError where the place that an option names cannot be asked what it holds."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        place.exists()
    except (OSError, ValueError, ImportError, BotoCoreError, ClientError) as error:
        raise BadInputError(
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
    if target.exists():
        return target
    partial = cache / f"{target.name}.{uuid.uuid4().hex}"
    for name, digest in marker["files"].items():
        file = partial / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as reader, file.open("wb") as writer:
            shutil.copyfileobj(reader, writer, _CHUNK)
        if digest_file(file) != digest:
            raise RunError(
                f"{source / name} is damaged: its digest is not the one it was saved with"
            )
    return settle(partial, target)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(text)
    partial.rename(path)


def read_json(path: UPath) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text())


def write_table(table: pa.Table, path: UPath) -> None:
    """Write a Parquet file; on a local disk it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        pq.write_table(table, path.path, filesystem=path.fs)
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    pq.write_table(table, partial.path)
    partial.rename(path)


def read_table(path: UPath) -> pa.Table:
    """Read a Parquet file, or all Parquet files of a folder in order of name."""
    files = sorted(path.glob("*.parquet"), key=str) if path.is_dir() else [path]
    return pa.concat_tables([pq.read_table(file.path, filesystem=file.fs) for file in files])
