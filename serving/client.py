"""Asking a served model a question, the answer streaming in."""

import os
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from cluster.config import RunConfig
from cluster.credentials import refuse_credentials
from cluster.endpoint_key import key_variable
from cluster.errors import BadInputError, RunError
from cluster.teachers import is_base_url
from cluster.waiting import waiting
from pipeline.endpoint import without_key
from pipeline.rows import Kind


def ask(
    url: str,
    question: str,
    model: str = "student",
    *,
    kind: Kind | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    api_key_env: str | None = None,
    out: TextIO | None = None,
) -> str:
    """Stream the answer of `model` at the OpenAI-style `url` to `out` or stdout, and return it.

    With `kind` the question is worded as in training (pipeline.tasks.instruct). The API key comes
    from the environment variable `api_key_env`: by default POTSTILL_API_KEY, or OPENAI_API_KEY
    where that is not set. Raises BadInputError where nothing answers, the key is refused or the
    model is not there, RunError where it cannot answer.
    """
    import openai

    refuse_credentials("--url", url)
    if not is_base_url(url):
        raise BadInputError(
            f"--url {url} is no base URL: expected one such as http://127.0.0.1:8000/v1, as "
            "`potstill serve` prints it"
        )
    out, variable = out or sys.stdout, api_key_env or key_variable()
    client = openai.OpenAI(base_url=url, api_key=os.environ.get(variable) or "none")
    pieces: list[str] = []
    with _explained(client, url, model, variable, pieces):
        with waiting(f"waiting for {model}, which starts if it is not loaded", tell=_tell):
            stream = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": _worded(question, kind)}],
                max_tokens=max_tokens,
                temperature=temperature,
                stream=True,
            )
        for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                pieces.append(piece)
                print(printable(piece), end="", flush=True, file=out)
    print(file=out)
    return "".join(pieces)


@contextmanager
def _explained(
    client: Any, url: str, model: str, variable: str, pieces: list[str]
) -> Iterator[None]:
    """Turn an openai client's errors into ours; `pieces` has what came of the answer so far."""
    import openai

    try:
        yield
    except openai.AuthenticationError:
        raise BadInputError(
            f"{url} refuses the API key: put the endpoint's own into the environment variable "
            f"{variable}, or name another variable with --api-key-env"
        ) from None
    except openai.NotFoundError:
        served = ", ".join(found.id for found in client.models.list())
        raise BadInputError(f"no model {model!r} at {url}: expected one of {served}") from None
    except openai.APIError as error:
        if isinstance(error, openai.APIConnectionError) and not pieces:
            raise BadInputError(
                f"nothing answers at {url}: start the endpoint with `potstill serve RUN`, or give "
                "its address"
            ) from None
        can = "broke off" if pieces else "cannot answer"
        raise RunError(f"{model} at {url} {can}: {without_key(error.message, variable)}") from None


def printable(text: str) -> str:
    """A model's text without the characters that would command a terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def example_question(config: RunConfig, model: str = "student", url: str | None = None) -> str:
    """The command that asks a served model of a run one of its test problems, as in training."""
    from pipeline.tasks import load_prompts, user_message

    example = load_prompts(config.task, "test", config.run.seed)[0]
    whole = example.choices or example.kind == "open"  # the words of the question and no others
    words = user_message(example) if whole else example.question
    kind = "" if whole else f" --kind {example.kind}"
    url = url or f"http://{config.serving.host}:{config.serving.port}/v1"
    return f"{program()} ask {shlex.quote(words)}{kind} --model {model} --url {url}"


def program() -> str:
    """How the command line was called, for commands that the user may copy."""
    called = sys.argv[0]
    if shutil.which("potstill") == called:
        return "potstill"
    return f"python {called}" if called.endswith(".py") else called


def _tell(line: str) -> None:
    print(line, file=sys.stderr)  # the answer alone goes to stdout


def _worded(question: str, kind: Kind | None) -> str:
    if kind is None:
        return question
    from pipeline.tasks import instruct

    return instruct(question, kind)
