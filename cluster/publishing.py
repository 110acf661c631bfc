"""Folders that count whole or not at all, by path or URL: published, proved, fetched, set aside.

Object stores have no rename, so a folder counts only once its marker, written last, is there. The
marker names each file with its digest, and is what readers go by: a listing may be late.
"""

import glob
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from filelock import FileLock
from upath import UPath

from cluster.digests import digest_file, digest_text
from cluster.errors import RunError
from cluster.progress import say
from cluster.storage import is_local, read_json, read_parquet, write_json, writing

MARKER = "PUBLISHED.json"
_STAGING = ".staging-"


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

    Afterwards `target` holds these files and no others, and `source` is gone. Raises RunError where
    the disk or the bucket gives back other bytes than it was given.
    """
    discard_folder(target)  # of a try that was killed before its marker
    digests = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        digests[name] = digest_file(file)
        if is_local(target):
            _flush(file)
            shutil.move(file, str(destination))
        else:
            destination.fs.put_file(str(file), destination.path)  # several parts at once
        if digest_file(destination) != digests[name]:
            raise RunError(
                f"{destination} does not give back what was written: run the same command again"
            )
    write_json(target / MARKER, {"files": digests})
    shutil.rmtree(source)


def _flush(file: Path) -> None:
    """Bring a file to its disk, before a marker gets there, and out of memory, so as to read it."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
    named = _named(folder)
    return bool(named) and _holds(folder, named)


def _named(folder: UPath) -> dict[str, str]:
    """The files that a folder's marker names, with digests; none where it cannot be read."""
    try:
        return _digests(folder, read_json(folder / MARKER))
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def _holds(folder: Path | UPath, digests: Mapping[str, str]) -> bool:
    try:
        return all(digest_file(folder / name) == digest for name, digest in digests.items())
    except FileNotFoundError:
        return False


def set_aside(file: UPath) -> None:
    """Rename a damaged file, so that it is made again and can still be looked at."""
    say(f"{file} is damaged: set aside, what it held is made again")
    name = f"{file.name}.damaged-{uuid.uuid4().hex[:8]}"
    with suppress(FileNotFoundError):  # another process was first
        file.fs.mv(file.path, file.with_name(name).path, recursive=True)


def set_aside_folder(folder: UPath) -> None:
    """set_aside of a published folder. Without its marker it counts no more in any case."""
    (folder / MARKER).unlink(missing_ok=True)
    set_aside(folder)


def staging_folder(target: UPath) -> Path:
    """A new empty folder to write files in, on `target`'s disk where that is local.

    One that a killed process left for the same target goes: it may fill the disk.
    """
    place, prefix = Path(tempfile.gettempdir()), f"potstill-{digest_text(str(target))}-"
    if is_local(target):
        place, prefix = Path(target.parent.path), f"{_STAGING}{target.name}-"
    place.mkdir(parents=True, exist_ok=True)
    for leftover in place.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=place))


def discard_folder(folder: UPath) -> None:
    """Remove a folder and all below it, the marker first, so that it never counts half."""
    named = _named(folder)
    (folder / MARKER).unlink(missing_ok=True)
    for name in named:  # a listing may not show them yet
        (folder / name).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        folder.fs.rm(folder.path, recursive=True)


def read_published(folder: UPath) -> pa.Table:
    """The rows of all Parquet files that a published folder names. Raises as read_parquet."""
    names = sorted(name for name in _named(folder) if name.endswith(".parquet"))
    return pa.concat_tables([read_parquet(folder / name) for name in names])


def fetch_folder(source: UPath, cache: Path) -> Path:
    """A local path of a published folder: itself if it is local, else a verified copy in `cache`.

    Raises RunError where a downloaded file does not have the digest that its marker gives.
    """
    if is_local(source):
        return Path(source.path)
    marker = json.loads((source / MARKER).read_text())
    target = cache / digest_text(str(source), json.dumps(marker, sort_keys=True))
    digests = _digests(source, marker)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # of a node's workers, one fetches
        if target.exists() and not _holds(target, digests):
            shutil.rmtree(target)
        if not target.exists():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            _download(source, digests, partial)
            partial.rename(target)
    return target


def _download(source: UPath, digests: Mapping[str, str], target: Path) -> None:
    for name, digest in digests.items():
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        source.fs.get_file((source / name).path, str(file))
        if digest_file(file) != digest:
            shutil.rmtree(target)
            raise RunError(
                f"{source / name} is damaged: its digest is not the one it was saved with"
            )


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
