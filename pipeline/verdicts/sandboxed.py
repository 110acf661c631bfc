"""What runs in the sandbox: an answer's code, then the tests, and one word to the parent.

The answer runs in an interpreter within the interpreter, which shares no object and no frame with
the one that knows the token. So the token cannot be read from where the answer runs, and the word
counts only with the token: leaving early, printing and patching lead to no word at all.
"""

import json
import os
import sys

# Beside what seccomp closes: ctypes would read the memory of the outer interpreter, and a trace
# function may jump over the lines of a test.
_GUARD = """
import sys

def _refuse(event, arguments):
    if event.startswith("ctypes.") or event in ("sys.settrace", "sys.setprofile"):
        raise RuntimeError(event + " is closed to answers")
    if event == "import" and arguments[0] in ("_ctypes", "_xxsubinterpreters"):
        raise ImportError(arguments[0] + " is closed to answers")

sys.addaudithook(_refuse)
sys.modules["answer"] = sys.modules["__main__"]
del sys, _refuse
__name__ = "answer"
"""

# Interpreters: to end one would wait for, or stumble over, what runs in it.
_kept: list[object] = []


def main() -> None:
    """Read one job from stdin, do it locked in, and end the process.

    The job is JSON: answer, tests, token, cpu_s, memory_mib, and report, the file descriptor for
    the word: the token followed by "right", or by why this machine cannot lock a process in.
    """
    job = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    word = _lock_in(job["cpu_s"], job["memory_mib"])
    try:
        if not word:
            _run(_GUARD, job["answer"], job["tests"])
        os.write(job["report"], f"{job['token']}{word or 'right'}".encode())
    finally:
        os._exit(0)  # at once, so that nothing that the answer left behind runs


def _lock_in(cpu_s: int, memory_mib: int) -> str:
    """Why this machine cannot; nothing where it is done."""
    from pipeline.verdicts.confinement import confine

    try:
        confine(cpu_s, memory_mib)
    except OSError as error:
        return str(error)
    return ""


def _run(*sources: str) -> None:
    import _xxsubinterpreters as interpreters

    inner = interpreters.create(isolated=False)
    _kept.append(inner)
    for source in sources:
        interpreters.run_string(inner, source)
