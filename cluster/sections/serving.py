"""The endpoint, and the evaluation."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cluster.sections.base import (
    Execution,
    Section,
)


class Serving(Section):
    """The OpenAI-style endpoint."""

    host: Execution[str] = "127.0.0.1"
    """Address to listen on. Any but this machine's own (127.0.0.1) demands a key in the environment
    variable POTSTILL_API_KEY; where that is set, each request must bring it."""
    port: Execution[Annotated[int, Field(ge=1, le=65535)]] = 8000
    """Port of the OpenAI-style endpoint."""
    resident: Execution[Literal["best", "all"]] = "best"
    """Keep base and best student loaded and start the others on demand, or keep all."""
    max_model_len: Execution[PositiveInt] = 2048
    """Context of a served model in tokens."""
    max_body_mib: Execution[PositiveFloat] = 4
    """A request with a larger body is refused (413)."""
    max_concurrency: Execution[PositiveInt] = 256
    """Requests for answers under way at once; one more is told to try again (429)."""
    kv_cache_gib: Execution[PositiveFloat] = 1
    """KV cache of a served model on a CPU."""
    gpus_per_model: Execution[PositiveFloat] = 1
    """GPUs of one replica of a model: a whole number, or a share where several live on one."""
    start_timeout_s: Execution[PositiveFloat] = 900
    """Give up, with a diagnosis, when the endpoint does not answer after this."""


class Evaluation(Section):
    """Greedy evaluation."""

    teacher: Execution[bool] = True
    """Evaluate the teacher too; behind an endpoint its answers cost as its traces do."""
    max_new_tokens: PositiveInt | None = None
    """Tokens of an evaluated answer; null takes sampling.max_new_tokens."""
    through: Execution[Literal["endpoint", "engines"]] = "endpoint"
    """endpoint serves the models as a user would ask them; engines samples greedily from the warm
    pool, and keeps the answers in the store."""
    concurrency: Execution[PositiveInt] = 32
    """Requests to the endpoint under way at once."""
    request_timeout_s: Execution[PositiveFloat] = 600
    """How long one request may take before the client library tries again."""
