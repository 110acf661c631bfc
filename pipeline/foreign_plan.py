"""The plan of a teacher that others serve: how many requests, and what they may cost."""

import os
from collections.abc import Sequence
from math import isinf

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.sections import Endpoint
from cluster.teachers import option_of
from pipeline.chat import Chat
from pipeline.endpoint import check_endpoint
from pipeline.foreign import (
    ForeignWriter,
    account_of,
    chat_endpoint,
    foreign_solver,
    foreign_writer,
    plan_foreign_requests,
)
from pipeline.rows import Prompt
from pipeline.spending import Budget
from pipeline.store import SampleStore
from pipeline.tasks import user_message
from pipeline.tasks.task import Split

_COUNTED_PROMPTS = 256


def plan_foreign(
    name: str, config: RunConfig, splits: dict[Split, list[Prompt]], chat: Chat
) -> list[tuple[str, str]]:
    """The rows of a teacher with an endpoint, which is asked whether it would answer, for nothing.

    `chat` is the student's, whose tokenizer counts the prompts in place of the teacher's. Raises
    BadInputError where the endpoint is not there, or refuses the key or the model.
    """
    teacher, kind = config.teachers[name], splits["train"][0].kind
    writer = foreign_writer(name, teacher, config, kind)
    stages = [(writer, splits["train"], config.sampling.samples)]
    if name == "teacher" and config.evaluation.teacher:
        stages.append((foreign_solver(name, teacher, config, kind), splits["test"], 1))
    store = SampleStore(storage.location(config.run.store))
    stored, seed = store.keys(writer.digest), config.run.seed
    total, prompt_tokens, tokens, missing = 0, 0, 0, 0
    for asked, prompts, samples in stages:
        keys = {request.key for request in plan_foreign_requests(asked, prompts, samples, seed)}
        left = len(keys - stored)
        total, missing = total + len(keys), missing + left
        prompt_tokens += round(left * _mean_prompt_tokens(asked, prompts, chat))
        tokens += left * asked.max_new_tokens
    if missing:  # else nothing will be asked, and the endpoint need not be there any more
        _check_key(name, writer.endpoint)
        check_endpoint(chat_endpoint(writer.model, writer.endpoint))
    what = f"{teacher.title}: {total} requests, {total - missing} of them in the store"
    if (pace := writer.endpoint.requests_per_minute) and missing:
        what += f", the rest in at least {missing / pace:.0f} min"
    budget = account_of(writer, config, store).open_budget()
    return [(name, what), (f"{name}'s cost", _cost(budget, prompt_tokens, tokens))]


def _check_key(name: str, endpoint: Endpoint) -> None:
    """Refuse a variable that is named and not set; without a name an endpoint may need no key."""
    variable = endpoint.api_key_env
    if variable != Endpoint.model_fields["api_key_env"].default and not os.environ.get(variable):
        raise BadInputError(
            f"{option_of(name)}.endpoint.api_key_env={variable} is not set in this environment: "
            f"export {variable} with the key, or remove the option where no key is needed"
        )


def _mean_prompt_tokens(writer: ForeignWriter, prompts: Sequence[Prompt], chat: Chat) -> float:
    some = prompts[:: max(1, len(prompts) // _COUNTED_PROMPTS)]
    counts = [len(chat.prompt_ids(user_message(prompt), writer.few_shot)) for prompt in some]
    return sum(counts) / max(1, len(counts))


def _cost(budget: Budget, prompt_tokens: int, tokens: int) -> str:
    amount = f"about {prompt_tokens} prompt tokens and at most {tokens} of answers"
    if isinf(budget.limit):
        return f"{amount}; no prices are given, so nothing is counted or limited"
    most = budget.cost(prompt_tokens, tokens)
    text = (
        f"at most about {most:.4g} ({amount}), {budget.spent:.4g} spent of "
        f"spending_limit={budget.limit:g}"
    )
    if budget.spent + most > budget.limit:
        text += "; where that is not enough the run stops, and goes on once it is raised"
    return text
