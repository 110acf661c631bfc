"""Folders of models that are made on this machine, once, and anew when their recipe has changed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from upath import UPath

from cluster import storage
from cluster.errors import BadInputError
from cluster.progress import say
from cluster.publishing import is_published, publishing

_NOTE = "README.md"  # says what the folder was made from; another note means: make it anew


def prepared_folder(name: str, cache: Path | None = None) -> Path:
    """Where the model of this name, or Hugging Face id, lies once it is prepared in the cache."""
    folder = name.replace("/", "--")
    return ((cache or storage.cache_folder()) / "models" / folder).absolute()


def is_prepared(name: str, cache: Path | None = None) -> bool:
    """Whether the model of this name, or Hugging Face id, lies whole in the cache."""
    return is_published(storage.location(str(prepared_folder(name, cache))))


def prepare_folder(
    name: str, note: str, make: Callable[[Path, Path], None], out: str | None, cache: Path | None
) -> UPath:
    """Let `make` write a model into a folder, and publish it whole with `note`, its model card.

    It gets that folder and one for scratch. The result lies at `out`, a path or URL, or in the
    cache, where one with another note is replaced. A folder that is ready is left as it is. Raises
    BadInputError for an `out` that holds something else.
    """
    target = storage.location(out or str(prepared_folder(name, cache)))
    if out:
        storage.check_writable("--out", target)
    if _is_ready(target, note):
        return target
    if out and target.exists() and any(target.iterdir()):
        raise BadInputError(
            f"{target} holds something other than {name}: give an empty or a new folder"
        )
    with _alone(target):
        if not _is_ready(target, note):
            _prepare(target, note, make)
    return target


@contextmanager
def _alone(target: UPath) -> Iterator[None]:
    """Keep other processes of this machine from making the same, which takes minutes."""
    if not storage.is_local(target):
        yield
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock").path):
        yield


def _is_ready(folder: UPath, note: str) -> bool:
    written = folder / _NOTE
    return is_published(folder) and written.exists() and written.read_text() == note


def _prepare(target: UPath, note: str, make: Callable[[Path, Path], None]) -> None:
    began = time.monotonic()
    near = target.parent.path if storage.is_local(target) else None
    with TemporaryDirectory(dir=near) as scratch, publishing(target) as made:
        make(made, Path(scratch))
        (made / _NOTE).write_text(note)
        for file in made.iterdir():
            file.chmod(0o644)  # weights are saved for their owner alone
    say(f"  ready in {time.monotonic() - began:.0f} s: {target}")
