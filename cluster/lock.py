"""One process at a time works in a run folder, and a lock never outlives the one that held it."""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout
from upath import UPath

from cluster.errors import EXIT_INTERRUPTED, BadInputError
from cluster.progress import complain, say
from cluster.storage import is_local

_LOCK = ".lock"
_BEAT_S = 5.0
_SILENCES = 4  # beats that a holder may miss before it counts as dead


@contextmanager
def locked(folder: UPath) -> Iterator[None]:
    """Hold the lock of a run folder for the length of the block.

    On a disk it is the kernel's (flock), gone with the process however that ends. In a bucket it is
    an object whose holder counts up in it every few seconds: one that stands still is dead. No
    clocks are compared, as those of two machines differ and jump. Raises BadInputError where
    another process holds it.
    """
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _on_disk(folder / _LOCK):
            yield
    else:
        with _Beating(folder / _LOCK, _BEAT_S):
            yield


def refuse_held(folder: UPath) -> None:
    """Raise BadInputError where a process of this machine works in a run folder on a disk."""
    if is_local(folder) and (folder / _LOCK).exists():
        with _on_disk(folder / _LOCK):
            pass


@contextmanager
def _on_disk(place: UPath) -> Iterator[None]:
    lock = FileLock(place.path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise _refusal(place) from None
    try:
        yield
    finally:
        lock.release()


def _refusal(place: UPath, holder: str = "another process") -> BadInputError:
    return BadInputError(
        f"{holder} works in {place.parent}: wait for its end or stop it, or set run.folder to "
        "a new folder (the store is shared by all runs)"
    )


class _Beating:
    """A lock in a bucket: the object tells who holds it, and how often that one has said so."""

    def __init__(self, place: UPath, beat_s: float) -> None:
        self._place, self._beat_s = place, beat_s
        self._id, self._beats = uuid.uuid4().hex, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> None:
        self._await_silence()
        try:
            self._write("create")
        except FileExistsError:
            if not self._is_ours(self._read()):  # a request that was sent again meets the first
                raise _refusal(self._place) from None
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._is_ours(self._read()):
            self._place.unlink(missing_ok=True)

    def _await_silence(self) -> None:
        """Take away what a dead holder left. Raises BadInputError where it lives."""
        found = self._read()
        if found is None:
            return
        say(f"{self._place.parent}: looking whether the process that last worked here still does")
        end = time.monotonic() + _SILENCES * self._beat_s
        while time.monotonic() < end:
            time.sleep(self._beat_s / 2)
            now = self._read()
            if now is None:
                return
            if now != found:
                raise _refusal(self._place, f"process {now.get('process')} on {now.get('host')}")
        self._place.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                if not self._is_ours(self._read()):
                    complain(f"stopped: another process has taken the run in {self._place.parent}")
                    os._exit(EXIT_INTERRUPTED)  # nothing more may be written here, not even orderly
                self._beats += 1
                self._write("overwrite")
            except Exception:  # noqa: BLE001
                # Whatever a storage's library raises is a beat that is missed; a thread that ended
                # would let another process in. We see it if one takes over.
                continue

    def _is_ours(self, found: dict[str, object] | None) -> bool:
        return found is not None and found.get("id") == self._id

    def _read(self) -> dict[str, object] | None:
        try:
            # One request: a file that is opened may be replaced before it is read.
            found = json.loads(self._place.fs.cat_file(self._place.path))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, mode: str) -> None:
        """Mode "create" raises FileExistsError where the object is there."""
        who = {"host": platform.node(), "process": os.getpid()}
        text = json.dumps(who | {"id": self._id, "beats": self._beats})
        self._place.fs.pipe_file(self._place.path, text.encode(), mode=mode)
