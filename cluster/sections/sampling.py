"""How traces are sampled, scored and paired."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cluster.sections.base import (
    Contrasting,
    Execution,
    NonNegativeFloat,
    Section,
    Share,
)

# Cores as vLLM takes them: a list of ranges for each process of an engine, or its own choice.
_CORES = r"^(auto|nobind|\d+(-\d+)?([,|]\d+(-\d+)?)*)$"


class Sampling(Section):
    """How traces are sampled from teacher and students."""

    samples: Annotated[int, Field(ge=1, le=10_000)] = 8
    """K: traces sampled for each prompt."""
    temperature: NonNegativeFloat = 0.8
    """Softmax temperature of the sampling; 0 is greedy, and then samples must be 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling's share of probability; 1 keeps every token."""
    max_new_tokens: PositiveInt = 512
    """A trace that reaches this length is cut and gets no end-of-turn token."""
    max_rouge_l: Share = 0.8
    """A trace is kept if its ROUGE-L to every kept trace of its prompt is at most this."""
    max_error_share: Execution[Share] = 0.01
    """A sampling stage fails when more than this share of its requests failed."""


class Engines(Section):
    """The pool of vLLM engines that samples; Ray Serve scales it between the two sizes."""

    min_engines: Execution[PositiveInt] = 1
    """Engines started at once."""
    max_engines: Execution[PositiveInt] = 1
    """Engines at the most; more come while requests queue."""
    engines_per_node: Execution[PositiveInt | None] = None
    """Engines on one node at the most; null leaves it to the resources."""
    tensor_parallel: Execution[PositiveInt] = 1
    """GPUs (or CPU processes) that share one engine's model."""
    cpus_per_engine: Execution[PositiveFloat] = 1
    """Logical CPUs that an engine holds for each of its processes."""
    cpu_threads: Execution[Annotated[str, Field(pattern=_CORES)] | None] = None
    """Cores that vLLM binds to on a CPU, such as "0-3", or "0-3|4-7" for two processes; null shares
    all of the machine's out."""
    max_model_len: Execution[PositiveInt] = 2048
    """Context of the engine in tokens: prompt and response."""
    kv_cache_gib: Execution[PositiveFloat] = 2
    """KV cache of an engine on a CPU, all its processes together."""
    gpu_memory_share: Execution[Share] = 0.9
    """Share of a GPU's memory that an engine takes."""
    enforce_eager: Execution[bool] = False
    """Skip compilation: a faster start, slower decoding."""
    batch_rows: Execution[PositiveInt] = 64
    """Samples that travel, and are stored, together."""
    batches_in_flight: Execution[PositiveInt] = 4
    """Batches sent to each engine at once, so that its decoding batch stays full."""
    pool: Execution[str | None] = None
    """Name of a pool that runs use one after the other, so that it stays warm between them; null
    gives each run its own."""
    between_epochs: Execution[Literal["keep", "release"]] = "keep"
    """Keep engines warm while the student trains, or release what they hold."""
    start_timeout_s: Execution[PositiveFloat] = 900
    """Give up, with a diagnosis, when engines are not ready after this."""


class Scoring(Section):
    """How given responses are scored under the reference and the teacher."""

    engine: Execution[Literal["vllm", "forward"]] = "vllm"
    """vllm asks the warm engines for the log-probabilities of a prompt; forward runs the model by
    transformers, for architectures that vLLM lacks."""
    forward_tokens: Execution[PositiveInt] = 4096
    """Tokens that a forward pass takes through the model at once."""


class Pairs(Section):
    """How positives are paired with negatives: the mixed policy."""

    phi: Contrasting[Share] = 0.5
    """The chance that a negative comes from a later student and not from the base student."""
    phi_schedule: Contrasting[tuple[Share, ...] | None] = None
    """A phi for each epoch, in the place of the one for all; the first epoch's changes nothing."""
    negatives: Contrasting[Literal["wrong", "wrong_or_unparsed"]] = "wrong"
    """Which traces may be negatives; an unparsed one teaches format, not reasoning."""
    negatives_from: Contrasting[Literal["student", "teacher"]] = "student"
    """Whose wrong traces are the negatives; the teacher's need phi 0, as they never change."""
    base: Contrasting[Literal["once", "fresh"]] = "once"
    """Sample the base student's negatives once for all epochs, or fresh ones for each epoch, while
    the epoch before it trains; that needs room for an engine beside the training workers."""
    draw: Contrasting[Literal["uniform", "similar", "recent"]] = "uniform"
    """Which of a prompt's negatives is taken: any of the latest student's, the one most like the
    positive (ROUGE-L), or any of all students' since the first epoch, younger ones more often."""
    positives_per_prompt: PositiveInt | None = None
    """Teacher traces of a prompt to train on; null takes all K, 1 is single-CoT."""

    def phi_in(self, epoch: int) -> float:
        """phi of an epoch 1, 2, ..."""
        return self.phi_schedule[epoch - 1] if self.phi_schedule else self.phi
