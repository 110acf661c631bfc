"""Verdicts by unit tests: the Python code of an answer passes those of its row, or it does not."""

import ast
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import BadInputError
from cluster.progress import progress
from cluster.sections import UnitTestsVerdict
from pipeline.rows import Prompt, Verdict
from pipeline.verdicts.exact import Answered, Grader
from pipeline.verdicts.sandbox import Limits, passes

_FENCED = re.compile(
    r"^ {0,3}```[ \t]*(\w*)[^\n]*\n(.*?)^ {0,3}```[ \t]*$", re.DOTALL | re.MULTILINE
)
_BARE_CODE = re.compile(r"^(?:(?:async +)?def +\w+ *\(|class +\w+ *[(:])", re.MULTILINE)
_PYTHON = ("python", "python3", "py")


def unit_tests_grader(section: UnitTestsVerdict) -> Grader:
    """A grader that runs each answer's code with its row's tests: see pipeline/verdicts/sandbox.py.

    No code is "unparsed"; code that does not pass within the limits, for whatever reason, "wrong".
    Raises BadInputError where the sandbox does not work here.
    """
    limits = Limits(section.time_limit_s, section.memory_limit_mib)
    check_sandbox(limits)

    def grader(answered: Sequence[Answered]) -> list[Verdict]:
        workers = section.concurrency or os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool, progress("unit tests", len(answered)) as bar:
            verdicts = []
            for verdict in pool.map(lambda one: _verdict(one[0], one[1], limits), answered):
                verdicts.append(verdict)
                bar.advance()
            return verdicts

    return grader


def _verdict(prompt: Prompt, text: str, limits: Limits) -> Verdict:
    code = find_code(text)
    if code is None:
        return "unparsed"
    assert prompt.tests is not None  # see check_tests
    return "right" if passes(code, prompt.tests, limits) else "wrong"


def find_code(text: str) -> str | None:
    """The last closed ```python block, else the last unnamed one, else a text that defines things.

    None where there is neither. A text without any block counts if a line of it starts a function
    or a class.
    """
    blocks = [(name.lower(), code) for name, code in _FENCED.findall(text)]
    for names in (_PYTHON, ("",)):
        if found := [code for name, code in blocks if name in names]:
            return found[-1]
    return text if "```" not in text and _BARE_CODE.search(text) else None


def check_sandbox(limits: Limits) -> None:
    """Raise BadInputError where not even a right answer passes."""
    if not passes("def one():\n    return 1", "assert one() == 1", limits):
        raise BadInputError(
            f"task.verdict by unit_tests: not even `return 1` passes within time_limit_s="
            f"{limits.cpu_s:g} and memory_limit_mib={limits.memory_mib}: raise them"
        )


def check_tests(prompts: Sequence[Prompt]) -> None:
    """Raise BadInputError where a prompt has no tests, or such as cannot fail."""
    lacking = [prompt.prompt_id for prompt in prompts if prompt.tests is None]
    if lacking:
        raise BadInputError(
            f"task.verdict by unit_tests needs a column tests of Python code: {len(lacking)} of "
            f"{len(prompts)} prompts have none, the first is {lacking[0]}"
        )
    for prompt in prompts:
        try:
            nodes = list(ast.walk(ast.parse(prompt.tests or "")))
        except (SyntaxError, ValueError) as error:
            raise BadInputError(
                f"the tests of prompt {prompt.prompt_id} are no Python code: {error}"
            ) from None
        if not any(isinstance(node, ast.Assert | ast.Raise) for node in nodes):
            raise BadInputError(
                f"the tests of prompt {prompt.prompt_id} cannot fail: expected code with assert "
                "statements, which run after the answer's code"
            )
