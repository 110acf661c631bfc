"""What of the working folder a job takes along, found before anything is sent.

The files are picked by the functions with which Ray packs them, since they alone know what it makes
of .gitignore and .rayignore; its package is a zip without compression.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.storage import cache_folder, is_local, location

# Ray's job server refuses a body of this size.
LIMIT_BYTES = 100 * 2**20
_KEPT_BACK = (
    *("/runs", "/store", "/models", "/build"),
    *(".git", ".venv", "venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"),
)
_SHOWN = 5
_ZIP_ENTRY_BYTES, _ZIP_END_BYTES = 30 + 46, 22  # the name comes to each entry twice


def kept_back(configs: Iterable[RunConfig], folder: Path) -> list[str]:
    """Patterns, as of .gitignore, of what stays here: runs, stores, models, environments, caches.

    Those that these runs name are among them, wherever they lie below `folder`.
    """
    places = [location(str(cache_folder()))]
    for config in configs:
        places += [location(config.run.folder), location(config.run.store)]
    inside = [
        Path(place.path).relative_to(folder).as_posix()
        for place in places
        if is_local(place) and Path(place.path).is_relative_to(folder)
    ]
    return [*_KEPT_BACK, *dict.fromkeys(_pattern_of(name) for name in inside if name != ".")]


def _pattern_of(name: str) -> str:
    """The pattern of .gitignore that only this path matches."""
    return "/" + re.sub(r"([*?\[\\])", r"\\\1", name)


def find_parcel(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """The entries of the zip that Ray makes of `folder`, with their sizes in bytes.

    Empty folders are entries too, and end in a slash. Raises BadInputError for what it cannot read.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: dict[str, int] = {}

    def add(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            found[name] = path.stat().st_size
        elif path.is_dir() and not any(path.iterdir()):
            found[f"{name}/"] = 0

    patterns = [*get_runtime_env_default_excludes(), *excludes]
    ignores = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") == "1"
    try:
        _dir_travel(folder, [_get_excludes(folder, patterns)], add, include_gitignore=not ignores)
    except OSError as error:
        raise BadInputError(
            f"{folder} cannot be packed for a job ({error}): make all in it readable, or name in "
            ".gitignore what the job does not need"
        ) from None
    return found


def size_of(parcel: Mapping[str, int]) -> int:
    """Bytes of the zip that holds these entries."""
    names = sum(len(name.encode()) for name in parcel)
    return sum(parcel.values()) + 2 * names + _ZIP_ENTRY_BYTES * len(parcel) + _ZIP_END_BYTES


def refuse_large(parcel: Mapping[str, int], folder: Path) -> None:
    """Raise BadInputError, naming the largest files, where Ray's job server would not take it."""
    size = size_of(parcel)
    if size < LIMIT_BYTES:
        return
    largest = sorted(parcel, key=lambda name: parcel[name], reverse=True)[:_SHOWN]
    files = ", ".join(f"{name} ({mebibytes(parcel[name])})" for name in largest)
    raise BadInputError(
        f"{folder} holds {mebibytes(size)} that a job would take along, expected less than "
        f"{mebibytes(LIMIT_BYTES)}; the largest: {files}. Name what the run does not need in "
        ".gitignore or .rayignore, and bring data and models to where all nodes read them"
    )


def mebibytes(size: int) -> str:
    """A size in bytes, in words."""
    return f"{size / 2**20:.1f} MiB"


def refuse_left_behind(config: RunConfig, parcel: Mapping[str, int], folder: Path) -> None:
    """Raise BadInputError where an option names a file of `folder` that the job would not have."""
    for option, value in _texts(config.model_dump(mode="json")):
        name = value.partition(":")[0]  # file.py:function
        if _is_here(name, folder) and not _is_in(os.path.normpath(name), parcel):
            raise BadInputError(
                f"{option}={value} lies in {folder}, but a job does not take it along (it is "
                "empty, outside, among runs, models and caches, or in .gitignore): move it, or "
                "give the path or URL at which the cluster's nodes find it"
            )


def _texts(value: Any, option: str = "") -> Iterator[tuple[str, str]]:
    """All texts in nested options, each with its dotted name."""
    if isinstance(value, str):
        yield option, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{option}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, option)


def _is_here(name: str, folder: Path) -> bool:
    """Whether a text is the path of something, relative to `folder`."""
    if not name or "\n" in name or len(name) > 255 or Path(name).is_absolute():
        return False
    return (folder / name).exists()


def _is_in(name: str, parcel: Mapping[str, int]) -> bool:
    return name in parcel or any(entry.startswith(f"{name}/") for entry in parcel)
