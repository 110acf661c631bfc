"""Runs an answer's code and its tests in a process that is locked in, and ends it in time."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import IO

from cluster.errors import BadInputError

# -I and -S: no environment, no user's packages, and nothing from the folder it runs in.
_START = (
    "import sys; sys.path.insert(0, {root!r}); from pipeline.verdicts.sandboxed import main; main()"
)
_CLOCK_TIMES_CPU = 3  # a machine that is busy gives an answer less than a core
_LOOK_S = 0.1
_FOLDER_BYTES = 64 << 20
_BLOCK = 4096


@dataclass(frozen=True)
class Limits:
    """What one answer with its tests may take."""

    cpu_s: float
    memory_mib: int


def passes(answer: str, tests: str, limits: Limits) -> bool:
    """Whether `tests` run to their end after the code of `answer`, in its interpreter.

    False where either raises, leaves, or takes more than the limits. Raises BadInputError where
    this machine cannot lock a process in.
    """
    token = secrets.token_hex(16)
    with _report_pipe() as (reader, writer), _scratch_folder() as folder:
        process = _start(folder, writer)
        try:
            job = {
                "answer": answer,
                "tests": tests,
                "token": token,
                "report": writer,
                "cpu_s": ceil(limits.cpu_s),
                "memory_mib": limits.memory_mib,
            }
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stream:
                stream.write(json.dumps(job).encode())
            _wait(process, folder, _CLOCK_TIMES_CPU * limits.cpu_s)
        finally:
            _end(process)
        said = (reader.read(_BLOCK) or b"").decode(errors="replace")
    if not said.startswith(token) or said == token:
        return False
    if said != f"{token}right":
        raise BadInputError(
            f"task.verdict by unit_tests: this machine cannot close the sandbox "
            f"({said.removeprefix(token)}): take one whose Linux has seccomp, or another verdict"
        )
    return True


@contextmanager
def _report_pipe() -> Iterator[tuple[IO[bytes], int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # whoever else may hold the other end, nothing waits for them
    with open(reader, "rb", buffering=0) as stream:
        try:
            yield stream, writer
        finally:
            os.close(writer)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(
        prefix="potstill-tests-", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _start(folder: Path, writer: int) -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _START.format(root=root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=(writer,),
        start_new_session=True,
    )


def _wait(process: "subprocess.Popen[bytes]", folder: Path, limit_s: float) -> None:
    """Until the process ends, its time is up, or its files are too many; it starts no folder."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and _size(folder) <= _FOLDER_BYTES:
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(_LOOK_S, max(0, deadline - time.monotonic())))
            return


def _size(folder: Path) -> int:
    size = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            size += max(_BLOCK, entry.stat(follow_symlinks=False).st_size)
    return size


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
