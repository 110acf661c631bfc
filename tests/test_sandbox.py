"""The sandbox of unit tests: what passes, what cannot be faked, and what an answer cannot reach."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.verdicts import sandbox
from pipeline.verdicts.sandbox import Limits, passes

PROJECT = Path(__file__).parents[1]
LIMITS = Limits(cpu_s=1, memory_mib=256)
WRONG = "def double(x):\n    return x\n"
TESTS = "assert double(2) == 4\nassert double(0) == 0"
# Whether the kernel refuses an action. The tests demand it, so that code which never ran is seen.
REFUSED = """
def refused(action):
    try:
        action()
    except (OSError, RuntimeError, ImportError, MemoryError, ValueError):
        return True
    return False
"""


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where the sandbox puts its folders; nothing may be left there."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []


def test_a_right_answer_passes_and_a_wrong_one_does_not():
    assert passes("def double(x):\n    return 2 * x", TESTS, LIMITS)
    assert not passes(WRONG, TESTS, LIMITS)
    assert not passes("def double(x:", TESTS, LIMITS)
    assert not passes("1 / 0", "assert True", LIMITS)


def test_the_standard_library_and_a_folder_of_its_own_are_there():
    answer = """
import asyncio, collections, dataclasses, datetime, decimal, json, math, os, pickle, random, re
import tempfile, typing, unittest, zoneinfo

@dataclasses.dataclass
class Point:
    x: "int" = 1

async def later():
    await asyncio.sleep(0)
    return 3

if __name__ == "__main__":
    raise SystemExit("nobody wants to run the example")
"""
    tests = """
assert asyncio.run(later()) == 3
assert pickle.loads(pickle.dumps(Point())) == Point()
assert os.listdir() == []
with open("a.txt", "w") as stream:
    stream.write("kept")
os.rename("a.txt", "b.txt")
assert open("b.txt").read() == "kept"
with tempfile.TemporaryFile() as stream:
    stream.write(b"x")
try:
    input()
except EOFError:
    pass
else:
    raise AssertionError("stdin is open")
"""
    assert passes(answer, tests, LIMITS)


CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit in a test": WRONG + "import os\ndef double(x): os._exit(0)",
    "exit by exception": "raise SystemExit(0)",
    "patches": WRONG
    + """
import builtins, os, sys
builtins.AssertionError = builtins.Exception = type("Calm", (), {})
sys.exit = os._exit = lambda *_: None
sys.excepthook = sys.unraisablehook = lambda *_: None
""",
    "prints": WRONG
    + """
import os
for word in (b"right", b"token", b"passed", b"0" * 32 + b"right"):
    print(word, flush=True)
    for fd in range(64):
        try:
            os.write(fd, word)
        except OSError:
            pass
os._exit(0)
""",
    # Looks for what may be the token in all objects, in all frames, and in what is left to read.
    "finds the token": WRONG
    + """
import gc, os, re, sys
seen = []
frame = sys._getframe()
while frame:
    seen += [repr(frame.f_globals), repr(frame.f_locals)]
    frame = frame.f_back
seen += [repr(thing) for thing in gc.get_objects() if isinstance(thing, (dict, list, tuple))]
seen += [repr(sys.argv), repr(sys.orig_argv)]
for fd in range(64):
    try:
        os.set_blocking(fd, False)
        seen.append(repr(os.read(fd, 10_000)))
    except OSError:
        pass
for token in set(re.findall("[0-9a-f]{32}", " ".join(seen))):
    for fd in range(3, 64):
        try:
            os.write(fd, token.encode() + b"right")
        except OSError:
            pass
os._exit(0)
""",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_success_cannot_be_faked(cheat):
    assert not passes(CHEATS[cheat], TESTS, LIMITS)


def test_a_line_of_the_tests_cannot_be_jumped_over():
    jumps = """
import sys

def jump(frame, event, argument):
    if event == "line" and frame.f_lineno == 2:
        frame.f_lineno = 3
    return jump

def double(x):
    sys._getframe(1).f_trace = jump
    sys.settrace(jump)
    return 0
"""
    assert not passes(jumps, "zero = double(0)\nassert double(2) == 4\nzero = None", LIMITS)


def test_the_memory_that_holds_the_token_cannot_be_read():
    tests = """
assert refused(lambda: __import__("ctypes"))
assert refused(lambda: __import__("_ctypes"))
assert refused(lambda: __import__("_xxsubinterpreters"))
assert refused(lambda: open("/proc/self/mem", "rb"))
"""
    assert passes(REFUSED, tests, LIMITS)


HOGS = {
    "a loop": "while True: pass",
    "a sleep": "import time; time.sleep(1000)",
    "a loop that minds no signal": """
import signal
for number in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
while True: pass
""",
    "memory": "hoard = bytearray(4 << 30)",
    "much memory by and by": "hoard = []\nwhile True: hoard.append(bytearray(1 << 20))",
    "recursion": "def down(n): return down(n + 1)\ndown(0)",
    "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
def down(n): return down(n + 1)
down(0)
""",
    "a huge file": "with open('x', 'wb') as s:\n    while True: s.write(bytes(1 << 20))",
    "a sparse file": "with open('x', 'wb') as s: s.truncate(1 << 40)",
    "many files": """
import itertools
for n in itertools.count():
    with open(str(n), "wb") as stream: stream.write(bytes(1 << 20))
""",
    "much output": "while True: print('x' * 10_000)",
    "a full report": """
import os
for fd in range(3, 64):
    try:
        while True: os.write(fd, bytes(10_000))
    except OSError:
        pass
""",
}


@pytest.mark.parametrize("hog", HOGS)
def test_time_memory_and_disk_are_limited(hog):
    assert not passes(HOGS[hog], "", Limits(cpu_s=0.3, memory_mib=256))


def test_the_files_of_an_answer_are_limited_together(scratch, monkeypatch):
    sizes = []
    size = sandbox._size
    monkeypatch.setattr(sandbox, "_size", lambda folder: sizes.append(size(folder)) or sizes[-1])
    assert not passes(HOGS["many files"], "", Limits(cpu_s=60, memory_mib=256))
    assert sizes[-1] > sandbox._FOLDER_BYTES


def test_memory_is_limited():
    tests = """
half = bytearray(128 << 20)
assert refused(lambda: bytearray(128 << 20))
"""
    assert passes(REFUSED, tests, LIMITS)


def test_one_file_is_limited():
    tests = """
with open("x", "wb") as stream:
    assert refused(lambda: stream.write(bytes(17 << 20)))
    assert refused(lambda: stream.truncate(1 << 40))
"""
    assert passes(REFUSED, tests, LIMITS)


def test_no_process_or_thread_can_be_started():
    tests = """
import multiprocessing, os, subprocess, sys, threading
assert refused(os.fork)
assert refused(lambda: subprocess.run([sys.executable, "-c", "pass"]))
assert refused(lambda: os.posix_spawn("/bin/true", ["true"], {}))
assert refused(lambda: os.execv("/bin/true", ["true"]))
assert refused(lambda: multiprocessing.Process(target=print).start())
assert refused(lambda: threading.Thread(target=print).start())
"""
    assert passes(REFUSED, tests, LIMITS)


def test_a_fork_bomb_leaves_nothing_behind(tmp_path):
    mark = tmp_path / "mark"
    bomb = f"""
import os
while True:
    try:
        if os.fork() == 0:
            os.setsid()
            open({str(mark)!r}, "w")
    except OSError:
        pass
"""
    before = processes()
    assert not passes(bomb, "", Limits(cpu_s=0.3, memory_mib=256))
    assert not mark.exists()
    assert [name for name in processes() - before if "sandboxed" in name] == []


def processes() -> set[str]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.add(f"{folder.name} {(folder / 'cmdline').read_text()}")
        except OSError:
            continue
    return found


def test_other_processes_cannot_be_signalled_watched_or_limited():
    tests = f"""
import fcntl, os, resource, signal
me = {os.getpid()}
assert os.getppid() == me
for target in (me, -me, -1, 0, os.getpid()):
    assert refused(lambda: os.kill(target, signal.SIGTERM))
assert refused(lambda: os.killpg(os.getpgid(0), signal.SIGTERM))
assert refused(lambda: signal.pidfd_send_signal(os.pidfd_open(me), signal.SIGTERM))
assert refused(lambda: resource.prlimit(me, resource.RLIMIT_CPU, (1, 1)))
assert refused(lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)))
assert refused(lambda: os.setpriority(os.PRIO_PROCESS, me, 19))
reader, writer = os.pipe()
assert refused(lambda: fcntl.fcntl(reader, fcntl.F_SETOWN, me))
"""
    assert passes(REFUSED, tests, LIMITS)


def test_no_network(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local,
    ):
        local.bind(str(tmp_path / "local"))
        tests = f"""
import socket, urllib.request
assert refused(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]})))
assert refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
assert refused(lambda: socket.socket(socket.AF_UNIX))
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
one.send(b"to oneself")
assert refused(lambda: one.sendto(b"out", {str(tmp_path / "local")!r}))
assert refused(lambda: urllib.request.urlopen("http://127.0.0.1"))
"""
        assert passes(REFUSED, tests, LIMITS)


def test_secrets_of_the_environment_and_of_files_are_out_of_sight(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "planted")
    (tmp_path / "key").write_text("planted")
    tests = f"""
import os
assert set(os.environ) <= {{"LC_CTYPE"}}  # which Python itself sets
assert refused(lambda: open("/proc/self/environ").read())
assert refused(lambda: open("/proc/{os.getpid()}/environ").read())
assert refused(lambda: open({str(tmp_path / "key")!r}).read())
assert refused(lambda: os.listdir({str(tmp_path)!r}))
assert refused(lambda: os.listdir("/"))
assert refused(lambda: open("/etc/passwd").read())
"""
    assert passes(REFUSED, tests, LIMITS)


def test_nothing_can_be_written_but_in_its_folder(tmp_path, scratch):
    mine = tmp_path / "mine"
    mine.write_text("kept")
    tests = f"""
import os, shutil
mine = {str(mine)!r}
assert refused(lambda: open(mine, "w"))
assert refused(lambda: open(mine + ".new", "w"))
assert refused(lambda: open({str(scratch / "escaped")!r}, "w"))
assert refused(lambda: os.remove(mine))
assert refused(lambda: os.rename(mine, "here"))
assert refused(lambda: os.truncate(mine, 0))
assert refused(lambda: os.chmod(mine, 0))
assert refused(lambda: os.utime(mine))
assert refused(lambda: os.symlink(mine, "link"))
assert refused(lambda: os.link(mine, "link"))
assert refused(lambda: os.mkdir("folder"))
assert refused(lambda: open("/dev/shm/escaped", "w"))
assert refused(lambda: os.memfd_create("hidden"))
"""
    assert passes(REFUSED, tests, LIMITS)
    assert mine.read_text() == "kept"
    assert mine.stat().st_mode & 0o777


def confined(code: str, folder: Path, before: str = "") -> str:
    """What `code` prints in a process that was locked in, after `before`."""
    start = f"from pipeline.verdicts import confinement\n{before}\nconfinement.confine(5, 512)\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{start}{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_without_landlock_nothing_can_be_written_at_all(tmp_path):
    (tmp_path / "there").write_text("read")
    none = "confinement._close_files = lambda: False"
    assert confined("print(open('there').read())", tmp_path, none) == "read"
    for write in ("open('new', 'w')", "open('there', 'a')", "os.remove('there')"):
        assert "not implemented" in confined(f"import os; {write}", tmp_path, none)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["there"]


def test_root_has_no_more_rights_than_others(tmp_path):
    free = "keep = open('/proc/self/status')"
    code = "print([line for line in keep.read().split('\\n') if line.startswith('CapEff')])"
    assert confined(code, tmp_path, free) == "['CapEff:\\t0000000000000000']"


def test_a_machine_that_cannot_lock_in_is_refused(monkeypatch):
    from cluster.errors import BadInputError

    monkeypatch.setattr(
        sandbox,
        "_START",
        "import platform; platform.machine = lambda: 'riscv64'\n" + sandbox._START,
    )
    with pytest.raises(BadInputError, match=r"cannot close the sandbox .*Linux on x86_64"):
        passes("", "", LIMITS)
