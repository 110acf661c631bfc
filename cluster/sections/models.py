"""Teachers and students."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import PositiveFloat, PositiveInt

from cluster.sections.base import (
    Dtype,
    Execution,
    NonEmpty,
    NonNegativeFloat,
    Place,
    Section,
    Template,
)


class FewShot(Section):
    """One worked example."""

    question: str
    """A problem as the task would state it, without the instruction."""
    answer: str
    """A worked answer that ends in \\boxed{}."""


class Model(Section):
    """A model, and how it is talked to."""

    model: Place
    """A model folder, its URL, a Hugging Face id, or a name that `potstill models` prepares; of a
    teacher with an `endpoint` the id that it has there."""
    chat_template: Template | None = None
    """A Jinja chat template, as text or as the path of a file, whose text the run keeps; null takes
    the tokenizer's own."""
    dtype: Dtype = "bfloat16"
    """The dtype in which the model samples."""
    parameters: Execution[PositiveInt | None] = None
    """How many the model has, so that a table's cost can be told before its weights are at hand."""
    stop: tuple[NonEmpty, ...] = ()
    """Strings that end a trace, beside the model's own end-of-turn token."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave it off."""


class Endpoint(Section):
    """An OpenAI-style endpoint that others serve, and the limits within which it is asked."""

    url: str
    """Base URL of the API, as OpenAI's client takes it: mostly it ends in /v1."""
    api_key_env: Execution[str] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never written down."""
    concurrency: Execution[PositiveInt] = 8
    """Requests under way at once."""
    requests_per_minute: Execution[PositiveFloat | None] = None
    """Requests sent in a minute at the most, evenly spaced; null sends as soon as it may."""
    request_timeout_s: Execution[PositiveFloat] = 600
    """How long one request may take before the client library tries again."""
    length_parameter: Execution[Literal["max_tokens", "max_completion_tokens"]] = "max_tokens"
    """What the endpoint calls the limit of an answer; OpenAI's newer models know the second."""
    price_per_million_input_tokens: Execution[NonNegativeFloat | None] = None
    """Price of a million prompt tokens, in the currency of `spending_limit`."""
    price_per_million_output_tokens: Execution[NonNegativeFloat | None] = None
    """Price of a million tokens of answers."""
    spending_limit: Execution[PositiveFloat | None] = None
    """What the run may spend here, over all its tries; null, where it costs nothing, has no end."""


class Teacher(Model):
    """A model whose right traces are learned."""

    endpoint: Endpoint | None = None
    """Where others serve the model; null runs it on this cluster's engines."""
    few_shot: tuple[FewShot, ...] = ()
    """Worked examples shown to the teacher before each problem, never to the student."""
    traces_per_prompt: PositiveInt | None = None
    """Right traces of a prompt that may enter the pool of all teachers; null takes all."""

    @property
    def title(self) -> str:
        """What a reader calls it: the model, and the host that serves it if that is another."""
        return (
            f"{self.model} at {urlsplit(self.endpoint.url).netloc}" if self.endpoint else self.model
        )
