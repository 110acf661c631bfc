"""What a user sees: plain lines without a terminal, and nothing of what third parties print."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.progress import Progress

from cluster import progress as module
from cluster.progress import Bar, Board, _bars, progress, say


@pytest.fixture
def screen(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(module.console(), "_file", stream)  # None: the stdout of the day
    return stream


def test_plain_lines_come_at_the_start_at_intervals_and_at_the_end(screen, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("sampling", 4) as bar:
        bar.advance(loss=1.5)
        now[0] = 11.0
        bar.advance(loss=1.25)
        bar.advance()
        bar.advance(loss=0.5)
    start, first, last = screen.getvalue().splitlines()
    assert start == "sampling  0/4 (0 %)"
    assert first.startswith("sampling  2/4 (50 %)  loss 1.25")
    assert last == "sampling  4/4 (100 %)  loss 0.5"


def test_no_number_is_cut_on_a_terminal_of_80_columns(monkeypatch):
    stream = io.StringIO()
    terminal = Console(file=stream, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(module, "_console", terminal)
    with progress("epoch 12/12", 1200) as bar:
        bar.reach(1200, loss=1.8225, margin=0.40651)
    assert re.search("loss 1.82.*1200/1200 100% 0:00:00 eta 0:00:00", stream.getvalue())
    assert "…" not in stream.getvalue()


def test_a_bar_that_is_done_becomes_a_line_above_the_others():
    stream = io.StringIO()
    terminal = Console(file=stream, width=80, force_terminal=True, color_system=None)
    bars = Progress(*_bars().columns, console=terminal, auto_refresh=False)
    done, other = Bar("sampling", 2, bars), Bar("epoch 1/2", 9, bars)
    done.reach(2)
    done.stand()
    other.reach(3)
    assert re.search("sampling .*2/2", stream.getvalue())
    assert [task.completed for task in bars.tasks] == [3]


def test_text_is_never_markup(screen):
    say("[red]a trace[/red] in runs/m:100:q8")
    assert screen.getvalue() == "[red]a trace[/red] in runs/m:100:q8\n"


def test_a_board_gives_what_is_new_once_in_the_order_of_time():
    board = Board()
    board.update("sampling", 1, 4, {})
    board.say("a line")
    board.update("sampling", 2, 4, {"loss": 1.0})
    assert board.take() == [("a line", None), ("sampling", (2, 4, {"loss": 1.0}))]
    assert board.take() == []


def test_an_error_that_nobody_catches_is_one_line_for_the_user(tmp_path):
    log = tmp_path / "engines.log"
    program = (
        "from pathlib import Path; from cluster.progress import hush;"
        f"hush(Path({str(log)!r})); raise ValueError('a\\nb')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", f"failed: ValueError: a (traceback: {log})\n")
    assert "Traceback (most recent call last)" in log.read_text()


def test_a_second_log_takes_the_noise_and_ours_stays_on_the_screen(tmp_path):
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    program = (
        "import sys; from pathlib import Path; from cluster.progress import complain, hush, say;"
        "sys.excepthook = print\n"  # as Typer does
        f"for log in {[str(log) for log in logs]}:\n"
        "    hush(Path(log)); say('ours'); complain('wrong'); print('noise', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("ours\nours\n", "wrong\nwrong\n")
    assert [log.read_text() for log in logs] == ["noise\n", "noise\n"]


def test_third_parties_reach_the_log_and_not_the_screen(tmp_path):
    log = tmp_path / "logs" / "engines.log"
    program = (
        "import os, sys; from pathlib import Path; from cluster.progress import hush, say;"
        f"hush(Path({str(log)!r})); say('ours'); print('python noise', flush=True);"
        "os.write(1, b'native noise\\n'); os.write(2, b'native error\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("ours\n", "")
    assert log.read_text() == "python noise\nnative noise\nnative error\n"


def test_third_parties_do_not_reach_a_terminal_with_bars_either(tmp_path):
    log = tmp_path / "engines.log"
    program = (
        "import sys; from pathlib import Path; from cluster.progress import hush, progress;"
        f"hush(Path({str(log)!r}))\n"
        "with progress('sampling', 2) as bar:\n"
        "    bar.advance(2)\n"
        "    print('python noise', flush=True)\n"
        "    print('python error', file=sys.stderr)\n"
    )
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", program], stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    screen = os.read(ours, 1 << 16).decode()
    assert "sampling" in screen
    assert "100%" in screen
    assert "noise" not in screen
    assert log.read_text() == "python noise\npython error\n"
