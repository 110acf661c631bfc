"""`potstill eval`: one model, in a folder or at a URL, on one file of problems."""

import tempfile
import uuid
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from cluster import storage
from cluster.config import RunConfig, parse_config
from cluster.endpoint_key import key_variable
from cluster.errors import BadInputError
from cluster.progress import say
from cluster.refusals import refuse_taken_port
from cluster.sections import Serving
from cluster.session import ray_session, starts_own_cluster
from cluster.shapes import read_shape
from cluster.teachers import is_base_url
from cluster.validation import NOT_YAML
from evals.accuracy import Answer, answers_table
from evals.stage import measure
from pipeline.models import resolve_model
from pipeline.rows import Prompt
from pipeline.tasks import load_prompts
from pipeline.verdicts.choice import check_verdict, has_verdicts
from serving.app import start_serving, stop_serving
from serving.models import BASE, STUDENT, model_of_section


@dataclass(frozen=True)
class SingleEvaluation:
    """What to evaluate, and how. The defaults are those of `potstill eval`."""

    model: str  # a folder, a name or id that `potstill models` knows, or an OpenAI-style URL
    task: str
    data: str | None = None  # in place of the task's own data
    verdict: str | None = None  # the section task.verdict of an open task, as YAML
    model_name: str | None = None  # the id to ask for at a URL; "student" by default
    prompts: int | None = None  # all, or the first so many
    max_new_tokens: int = 512
    chat_template: str | None = None  # of a folder; text or path
    dtype: str = "bfloat16"
    concurrency: int = 32
    port: int = 8000
    answers: str | None = None  # path or URL of a Parquet file for the answers themselves
    api_key_env: str | None = None  # of a URL: POTSTILL_API_KEY, else OPENAI_API_KEY


def evaluate_model(wanted: SingleEvaluation) -> dict[str, Any]:
    """The accuracy of one model on the test split, or on all of `data`: see measure_accuracy.

    A folder is served for as long as it takes. Raises BadInputError for what cannot be evaluated,
    RunError where too many requests fail.
    """
    config = _config(wanted)
    split: Literal["test", "all"] = "test" if wanted.data is None else "all"
    _check_answers(wanted.answers)
    prompts = load_prompts(config.task, split, config.run.seed)
    _check_verdict(config, prompts)
    if wanted.model.startswith(("http://", "https://")):
        _check_url(wanted.model)
        name = wanted.model_name or STUDENT
        url, variable = _with_v1(wanted.model), wanted.api_key_env or key_variable()
        result, answers = measure(url, name, split, prompts, config, variable)
    else:
        result, answers = _measure_folder(config, prompts, split)
        result["model"] = wanted.model
    if wanted.answers is not None:
        storage.write_table(answers_table(answers), storage.location(wanted.answers))
    return result


def _measure_folder(
    config: RunConfig, prompts: list[Prompt], split: str
) -> tuple[dict[str, Any], list[Answer]]:
    model = model_of_section(BASE, config.student)
    if starts_own_cluster(config):
        refuse_taken_port(config.serving.host, config.serving.port)
    _check_context(config)
    with ray_session(config):
        say(f"starting {config.student.model}")
        try:
            endpoint = start_serving([model], config)
            return measure(endpoint.url, BASE, split, prompts, config)
        finally:
            stop_serving(config)


def _check_context(config: RunConfig) -> None:
    """Refuse weights that are not whole, and a context that the model does not have."""
    context = read_shape(resolve_model(config.student.model)).context
    if context and config.evaluation_tokens >= context:
        raise BadInputError(
            f"--max-new-tokens {config.evaluation_tokens} leaves no room for a prompt in the "
            f"{context} tokens of context of {config.student.model}: lower it"
        )


def _check_verdict(config: RunConfig, prompts: list[Prompt]) -> None:
    if not has_verdicts(config.task):
        raise BadInputError(
            f"task {config.task.name} has no verdicts, so nothing can be right or wrong: give one, "
            "such as --verdict '{by: function, function: \"mine.py:is_right\"}'"
        )
    check_verdict(config.task, prompts)


def _check_answers(answers: str | None) -> None:
    if answers is None:
        return
    file = storage.location(answers)
    storage.check_writable("--answers", file.parent)
    if storage.is_local(file) and file.is_dir():
        raise BadInputError(f"--answers {file} is a folder, expected the name of a Parquet file")


def _check_url(url: str) -> None:
    if not is_base_url(url):
        raise BadInputError(
            f"--model {url} is no base URL: expected one such as http://127.0.0.1:8000/v1, or a "
            "folder"
        )


def _with_v1(url: str) -> str:
    """A bare host serves below /v1; a path is where its owner says."""
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def _config(wanted: SingleEvaluation) -> RunConfig:
    section = {
        "model": wanted.model,
        "chat_template": wanted.chat_template,
        "dtype": wanted.dtype,
    }
    context = max(2048, 2 * wanted.max_new_tokens)
    raw = {
        # Named, never written; the name is that of the endpoint, which no other one may share.
        "run": {
            "folder": f"{tempfile.gettempdir()}/potstill-eval-{uuid.uuid4().hex}",
            "store": str(storage.cache_folder() / "judged"),  # what a judge says, and nothing else
        },
        "task": {
            "name": wanted.task,
            "data": wanted.data,
            "test_prompts": wanted.prompts,
            "verdict": _parse_verdict(wanted.verdict),
        },
        "teacher": section,
        "student": section,
        "engines": {"max_model_len": context},
        "serving": {
            "port": wanted.port,
            "max_model_len": context,
            "max_concurrency": max(wanted.concurrency, Serving().max_concurrency),
        },
        "evaluation": {
            "max_new_tokens": wanted.max_new_tokens,
            "concurrency": wanted.concurrency,
        },
    }
    return parse_config(raw, source="potstill eval")


def _parse_verdict(text: str | None) -> Any:
    try:
        return None if text is None else yaml.safe_load(text)
    except NOT_YAML as error:
        raise BadInputError(f"--verdict {text!r} is no YAML: {error}") from None
