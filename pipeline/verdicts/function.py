"""Verdicts by a Python function of the user's own."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.errors import BadInputError
from cluster.sections import FunctionVerdict
from pipeline.rows import Prompt, Verdict
from pipeline.verdicts.exact import Answered, Grader

Function = Callable[[str, dict[str, Any]], bool | None]
_VERDICTS: dict[bool | None, Verdict] = {True: "right", False: "wrong", None: "unparsed"}


def function_grader(section: FunctionVerdict) -> Grader:
    """A grader that calls the function that `section` names, one answer after the other.

    Raises BadInputError where there is none. The grader raises it where the function raises, or
    returns anything but True, False or None: that is a mistake in the function, and to go on would
    make it a verdict. The samples are stored by then, so a run goes on once it is mended.
    """
    function = load_function(section.function)

    def grader(answered: Sequence[Answered]) -> list[Verdict]:
        return [_verdict(function, section.function, prompt, text) for prompt, text in answered]

    return grader


def _verdict(function: Function, name: str, prompt: Prompt, text: str) -> Verdict:
    where = f"task.verdict.function={name} on an answer to prompt {prompt.prompt_id}"
    try:
        result = function(text, asdict(prompt))
    except Exception as error:
        raise BadInputError(
            f"{where} raised {type(error).__name__}: {error}. Mend it and run again; let it return "
            "None for an answer that it cannot read"
        ) from error
    if result is not None and not isinstance(result, bool):
        raise BadInputError(f"{where} returned {result!r}, expected True, False or None: mend it")
    return _VERDICTS[result]


def load_function(place: str) -> Function:
    """The function at "package.module:name" or "path/to/file.py:name".

    Raises BadInputError where it is not there, or does not take an answer and a prompt.
    """
    source, _, name = place.rpartition(":")
    if not source:
        raise BadInputError(
            f"task.verdict.function={place!r} names no function: expected package.module:name or "
            "path/to/file.py:name"
        )
    function = getattr(_load_module(source, place), name, None)
    if not callable(function):
        raise BadInputError(f"task.verdict.function={place!r}: {source} has no function {name!r}")
    try:
        inspect.signature(function).bind("an answer", {})
    except TypeError as error:
        raise BadInputError(
            f"task.verdict.function={place!r} does not take an answer's text and a prompt ({error})"
        ) from None
    return function


def _load_module(source: str, place: str) -> ModuleType:
    if source.endswith(".py") and not Path(source).is_file():
        raise BadInputError(
            f"task.verdict.function={place!r}: no file at {Path(source).absolute()}; give its path "
            "from the folder where potstill is started"
        )
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert spec is not None  # of every path that ends in .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # whatever the user's module does on its import
        raise BadInputError(
            f"task.verdict.function={place!r}: {source} cannot be imported "
            f"({type(error).__name__}: {error}); mend it, or install what it needs"
        ) from error
