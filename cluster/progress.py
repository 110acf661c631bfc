"""What a user sees of long work: one bar with an ETA on a terminal, plain lines elsewhere.

Work in another process of the cluster reports through a `Board`, a small Ray actor that the driver
watches; the same `progress` and `say` serve both sides.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from cluster.placement import beside_driver

_PLAIN_INTERVAL_S = 10.0
_BOARD_INTERVAL_S = 0.5
_board: Any = None


_console = Console(highlight=False, soft_wrap=True, emoji=False)
_errors = Console(highlight=False, soft_wrap=True, emoji=False, stderr=True)


def console() -> Console:
    """The console that reaches the user."""
    return _console


def hush(log_file: Path) -> None:
    """From now on, let the process's standard streams go to `log_file`, and only ours to the user.

    Done on the file descriptors, because C++ libraries and child processes write there. Of an
    error that nobody catches, the user sees one line, and the log has the traceback. Another call
    changes the log.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    for ours, stream in ((_console, sys.stdout), (_errors, sys.stderr)):
        if ours.file is stream:  # else it has been kept apart already
            ours.file = os.fdopen(os.dup(stream.fileno()), "w", buffering=1)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.excepthook = partial(_tell_failure, log_file)


def _tell_failure(
    log_file: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.__excepthook__(kind, error, trace)
    cause = getattr(error, "cause", None) or error  # Ray wraps what a remote function raised
    first = str(cause).partition("\n")[0]
    complain(f"failed: {type(cause).__name__}: {first} (traceback: {log_file})")


def say(text: str) -> None:
    """Print one line to the user, from whichever process."""
    if _board is not None:
        _board.say.remote(text)
    else:
        console().print(text, markup=False)


def complain(text: str) -> None:
    """Print one line about what went wrong to the user's standard error."""
    _errors.print(text, markup=False, style="red")


class Bar:
    """The progress of one piece of work. Made by `progress`."""

    def __init__(self, description: str, total: int, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID = bars.add_task(description, total=total, figures="")
        self._last_line = -_PLAIN_INTERVAL_S
        self.reach(0)

    def advance(self, count: int = 1, **figures: float) -> None:
        """Count work done; figures such as loss=1.48 are shown beside the bar."""
        self.reach(int(self._shown().completed) + count, **figures)

    def reach(self, done: int, **figures: float) -> None:
        """Set the count of work done."""
        shown = "  ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()
        )
        self._bars.update(self._task, completed=done, figures=shown)
        if not self._bars.live.is_started:
            self._plain_line()

    def stand(self) -> None:
        """Leave a bar that is done on the screen as a line, above those that still move."""
        self._bars.console.print(self._bars.make_tasks_table([self._shown()]))
        self._bars.remove_task(self._task)

    def _shown(self) -> Task:
        return next(task for task in self._bars.tasks if task.id == self._task)

    def _plain_line(self) -> None:
        task = self._shown()
        finished = task.completed >= (task.total or 0)
        if not finished and time.monotonic() - self._last_line < _PLAIN_INTERVAL_S:
            return
        self._last_line = time.monotonic()
        share = f"{task.completed:.0f}/{task.total:.0f} ({task.percentage:.0f} %)"
        unknown = finished or task.time_remaining is None
        left = "" if unknown else f"eta {task.time_remaining:.0f} s"
        parts = (task.description, share, task.fields["figures"], left)
        say("  ".join(part for part in parts if part))


class BoardBar:
    """A bar of a process that has no screen: it reports to the board."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._last = description, total, 0.0
        self.reach(0)

    def advance(self, count: int = 1, **figures: float) -> None:
        """Count work done."""
        self.reach(self._done + count, **figures)

    def reach(self, done: int, **figures: float) -> None:
        """Set the count of work done; the board hears of it at most twice a second."""
        self._done = done
        now = time.monotonic()
        if done >= self._total or now - self._last >= _BOARD_INTERVAL_S:
            self._last = now
            _board.update.remote(self._description, done, self._total, figures)


@contextmanager
def progress(description: str, total: int) -> Iterator[Bar | BoardBar]:
    """Show work of `total` pieces: `with progress("grading", 120) as bar: bar.advance()`."""
    if _board is not None:
        yield BoardBar(description, total)
        return
    bars = _bars()
    if not console().is_terminal:
        yield Bar(description, total, bars)
        return
    with bars:
        yield Bar(description, total, bars)


def _bars() -> Progress:
    # Where 80 columns are too few, the text takes another line, and no number is cut.
    text = TextColumn("{task.description}  {task.fields[figures]}", table_column=Column())
    return Progress(
        text,
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console(),
        speed_estimate_period=600,
        # While bars are shown, rich would else print on the screen what third parties print.
        redirect_stdout=False,
        redirect_stderr=False,
    )


State = tuple[int, int, dict[str, float]]  # pieces done, pieces in all, figures
Report = tuple[str, State | None]  # a line, or a piece of work with its state


class Board:
    """Between the driver and remote work: reports one way, a request to stop the other way.

    A Ray actor of no CPUs, which holds the reports until the driver shows them.
    """

    def __init__(self) -> None:
        self._can_save = self._asked_to_stop = False
        self._reports: list[Report] = []

    def say(self, text: str) -> None:
        """Keep a line for the driver."""
        self._reports.append((text, None))

    def update(self, description: str, done: int, total: int, figures: dict[str, float]) -> None:
        """Keep the newest state of one piece of work."""
        self._reports = [r for r in self._reports if r[1] is None or r[0] != description]
        self._reports.append((description, (done, total, figures)))

    def set_can_save(self, can_save: bool) -> None:
        """Whether remote work would now save what it has done when it is asked to stop."""
        self._can_save = can_save

    def ask_to_stop(self) -> bool:
        """Ask remote work to save what it has done and to end; whether it would hear of it soon."""
        self._asked_to_stop = True
        return self._can_save

    def asked_to_stop(self) -> bool:
        """Whether remote work is to end."""
        return self._asked_to_stop

    def take(self) -> list[Report]:
        """Give what came since the last call, in the order of time."""
        taken, self._reports = self._reports, []
        return taken


def attach(board: Any) -> None:
    """Let this process report to `board`, an actor handle, instead of a screen."""
    global _board
    _board = board


@contextmanager
def watched_board() -> Iterator[Any]:
    """Start a board, show what it hears until the block ends, and give its handle."""
    import ray

    board: Any = ray.remote(Board).options(num_cpus=0, **beside_driver()).remote()
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, stop), daemon=True)
    watcher.start()
    try:
        yield board
    finally:
        stop.set()
        watcher.join(timeout=5)
        ray.kill(board)


def _watch(board: Any, stop: threading.Event) -> None:
    import ray

    bars = _bars()
    shown: dict[str, Bar] = {}
    live = console().is_terminal
    if live:
        bars.start()
    while True:
        last = stop.wait(_BOARD_INTERVAL_S)
        for text, state in ray.get(board.take.remote()):
            if state is None:
                say(text)
                continue
            done, total, figures = state
            if text not in shown:
                shown[text] = Bar(text, total, bars)
            shown[text].reach(done, **figures)
            if live and done >= total:
                shown.pop(text).stand()
        if last:
            break
    if live:
        bars.stop()
