"""The sections of a run's configuration: every option, its default, and a sentence on it.

A field is part of the *recipe* (it shapes the result, and may not change within a run) unless its
type is marked `Execution` (where and how fast the same result is made).
"""

from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

T = TypeVar("T")
EXECUTION = "execution"
Execution = Annotated[T, EXECUTION]

Share = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Dtype = Literal["bfloat16", "float16", "float32"]


class Section(BaseModel):
    """A group of options: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Run(Section):
    """The run itself."""

    folder: Execution[str]
    """Where this run keeps its files: a path, or a URL such as s3://bucket/run."""
    store: Execution[str] = "store"
    """Where samples are kept for every run to reuse: a path or a URL."""
    seed: int = 0
    """Seeds sampling, the drawing of pairs, and their order."""


class Cluster(Section):
    """The Ray cluster that the run works on."""

    address: Execution[str | None] = None
    """The Ray cluster: null starts one on this machine, "auto" joins the one around a job."""
    accelerator: Execution[Literal["auto", "cpu", "gpu"]] = "auto"
    """What models run on; auto takes GPUs where a node with one is up, so say gpu where nodes start
    on demand."""
    gpu_hour_price: Execution[NonNegativeFloat | None] = None
    """What an hour of one GPU costs, in any currency; a table's plan then tells its cost."""
    logical_cpus: Execution[PositiveInt | None] = None
    """Logical CPUs of the cluster that `address: null` starts; null makes room for
    engines, workers and served models, and means at least eight."""


class FunctionVerdict(Section):
    """Answers to open prompts are right or wrong by a Python function."""

    by: Literal["function"]
    function: str
    """Where it is: "package.module:name" or "path/to/file.py:name". It takes an answer's text and a
    dict of the prompt (question, gold, tests), and returns True, False, or None for unparsed."""


class UnitTestsVerdict(Section):
    """Answers to open prompts are right where the Python code in them passes their row's tests.

    The code runs in a sandbox, a process of its own without network, other processes, environment
    or files to write but in an empty folder; docs/tasks.md has what it does and does not hold.
    """

    by: Literal["unit_tests"]
    time_limit_s: PositiveFloat = 5
    """CPU seconds of one answer and its tests; at three times as many of the clock it ends too."""
    memory_limit_mib: PositiveInt = 512
    """Address space of one answer and its tests."""
    concurrency: Execution[PositiveInt | None] = None
    """Answers tested at once; null means one for each core."""


class JudgeVerdict(Section):
    """Answers to open prompts are right or wrong by what a model says, asked greedily."""

    by: Literal["judge"]
    url: Execution[str]
    """The judge's OpenAI-style endpoint, such as http://127.0.0.1:8001/v1."""
    model: str
    """The model to ask for there."""
    api_key_env: Execution[str] = "OPENAI_API_KEY"
    """The environment variable that holds the key; an endpoint without keys needs none."""
    template: str | None = None
    """A Jinja text, or the path of one, with question, gold (none or a reference) and answer, that
    asks for "Verdict: right" or "Verdict: wrong"; null takes Potstill's own."""
    max_new_tokens: PositiveInt = 1024
    """Tokens of the judge's reply."""
    concurrency: Execution[PositiveInt] = 16
    """Requests under way at once."""
    request_timeout_s: Execution[PositiveFloat] = 600
    """How long one request may take before the client library tries again."""


AnyVerdict = FunctionVerdict | UnitTestsVerdict | JudgeVerdict


class Task(Section):
    """The problems to distil on, with known answers or a verdict on open ones."""

    name: str
    """A task of pipeline/tasks, such as word_problems or gsm8k."""
    data: str | None = None
    """A Hugging Face id, or a JSONL, JSON, CSV or Parquet file or folder; null: the task's own."""
    train_prompts: PositiveInt | None = None
    """How many prompts to distil on; null takes all."""
    validation_prompts: PositiveInt | None = None
    """How many validation prompts to choose the best epoch on; null takes all."""
    test_prompts: PositiveInt | None = None
    """How many test prompts to report on; null takes all."""
    largest_operand: PositiveInt | None = None
    """The difficulty of word_problems; null means 9. Other tasks refuse it."""
    verdict: Annotated[AnyVerdict, Field(discriminator="by")] | None = None
    """What makes an answer to an open prompt (task chat) right; null leaves answers ungraded."""


class FewShot(Section):
    """One worked example."""

    question: str
    """A problem as the task would state it, without the instruction."""
    answer: str
    """A worked answer that ends in \\boxed{}."""


class Model(Section):
    """A model, and how it is talked to."""

    model: str
    """A model folder, its URL, a Hugging Face id, or a name that `potstill models` prepares; of a
    teacher with an `endpoint` the id that it has there."""
    chat_template: str | None = None
    """A Jinja chat template, as text or as the path of a file; null takes the tokenizer's own."""
    dtype: Dtype = "bfloat16"
    """The dtype in which the model samples."""
    parameters: Execution[PositiveInt | None] = None
    """How many the model has, so that a table's cost can be told before its weights are at hand."""
    stop: tuple[str, ...] = ()
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


class Sampling(Section):
    """How traces are sampled from teacher and students."""

    samples: PositiveInt = 8
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
    cpu_threads: Execution[str | None] = None
    """Cores that vLLM binds to on a CPU, such as "0-3"; null means all of the machine's."""
    max_model_len: Execution[PositiveInt] = 2048
    """Context of the engine in tokens: prompt and response."""
    kv_cache_gib: Execution[PositiveFloat] = 2
    """KV cache of an engine on a CPU."""
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

    phi: Share = 0.5
    """The chance that a negative comes from a later student and not from the base student."""
    phi_schedule: tuple[Share, ...] | None = None
    """A phi for each epoch, in the place of the one for all; the first epoch's changes nothing."""
    negatives: Literal["wrong", "wrong_or_unparsed"] = "wrong"
    """Which traces may be negatives; an unparsed one teaches format, not reasoning."""
    negatives_from: Literal["student", "teacher"] = "student"
    """Whose wrong traces are the negatives; the teacher's need phi 0, as they never change."""
    draw: Literal["uniform", "similar", "recent"] = "uniform"
    """Which of a prompt's negatives is taken: any of the latest student's, the one most like the
    positive (ROUGE-L), or any of all students' since the first epoch, younger ones more often."""
    positives_per_prompt: PositiveInt | None = None
    """Teacher traces of a prompt to train on; null takes all K, 1 is single-CoT."""

    def phi_in(self, epoch: int) -> float:
        """phi of an epoch 1, 2, ..."""
        return self.phi_schedule[epoch - 1] if self.phi_schedule else self.phi


class Lora(Section):
    """Low-rank training by peft; checkpoints are merged, ordinary models."""

    rank: PositiveInt = 16
    """Rank of the low-rank update of each linear layer."""
    alpha: PositiveFloat = 32
    """Scale of the update: alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the update."""


class Training(Section):
    """The loss, the schedule, and how DeepSpeed carries them out."""

    method: Literal["orpo", "sft", "dadpo", "kto"] = "orpo"
    """orpo contrasts right with wrong traces beside the NLL; sft learns from right traces alone;
    dadpo prefers them by DPO anchored at reference and teacher; kto takes answers one by one."""
    odds_ratio_weight: NonNegativeFloat = 1.0
    """ORPO's lambda: the weight of the odds-ratio loss beside the NLL."""
    odds_gradient_cap: PositiveFloat | None = None
    """Cap on the gradient that one negative's odds may send back; null leaves it free."""
    reference_weight: NonNegativeFloat = 0.1
    """daDPO's beta 1, KTO's beta: how close to keep to the student as the run found it; 0 makes
    daDPO rDPO."""
    teacher_weight: NonNegativeFloat = 0.1
    """daDPO's beta 2: how much the teacher's own probabilities count; 0 makes it dDPO."""
    desirable_weight: NonNegativeFloat = 1.0
    """KTO's weight of chosen answers."""
    undesirable_weight: NonNegativeFloat = 1.0
    """KTO's weight of rejected answers."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the token-level KL to the teacher on chosen answers, beside any method; above 0 it
    loads the teacher, of the same tokenizer, beside the student."""
    kl_direction: Literal["reverse", "forward"] = "reverse"
    """reverse is KL(student || teacher), forward KL(teacher || student)."""
    nll_scope: Literal["response", "full"] = "response"
    """Tokens whose NLL is learned: the response alone, or the prompt as well."""
    nll_reduction: Literal["tokens", "pairs"] = "tokens"
    """What the NLL is a mean over: the tokens of the global batch, or its pairs' own means."""
    epochs: NonNegativeInt = 5
    """Passes over the pairs, negatives drawn anew before each; 0 only evaluates the base student
    and the teacher."""
    steps_per_epoch: PositiveInt | None = None
    """Optimizer steps of an epoch, its pairs coming again or not all of them; null is one pass.
    Arms with different numbers of pairs compare fairly at equal steps."""
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate of AdamW."""
    warmup_share: Share = 0.05
    """Share of all steps in which the learning rate rises; a cosine to 0 follows."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay of its first and second moments."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    gradient_clip: PositiveFloat = 1.0
    """Largest norm of a step's gradient."""
    global_batch: PositiveInt = 32
    """Pairs in one optimizer step, over all workers and micro-batches."""
    max_length: PositiveInt = 1024
    """Tokens of prompt and response; a longer trace is cut and counted."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; the optimizer's copy and the loss are float32."""
    lora: Lora | None = None
    """Train low-rank updates instead of all parameters."""
    micro_batch: Execution[PositiveInt] = 4
    """Pairs that one worker takes through the model at once."""
    workers: Execution[PositiveInt] = 1
    """Ray Train workers: one a GPU."""
    cpus_per_worker: Execution[PositiveFloat] = 1
    """Logical CPUs that a worker holds."""
    threads_per_worker: Execution[PositiveInt | None] = None
    """Threads of a CPU worker; null shares the machine's cores among the workers."""
    zero_stage: Execution[Literal[0, 1, 2, 3]] = 0
    """DeepSpeed's ZeRO stage: what is sharded over the workers."""
    offload: Execution[Literal["none", "optimizer", "parameters"]] = "none"
    """What ZeRO moves to the host's memory; parameters includes the optimizer, at stage 3."""
    gradient_checkpointing: Execution[bool] = False
    """Recompute activations in the backward pass, for less memory and a third more time."""
    resample_timeout_s: Execution[PositiveFloat] = 3600
    """How long workers wait for the next epoch's pairs before they stop with a diagnosis."""


class Serving(Section):
    """The OpenAI-style endpoint."""

    host: Execution[str] = "127.0.0.1"
    """Address to listen on."""
    port: Execution[Annotated[int, Field(ge=1, le=65535)]] = 8000
    """Port of the OpenAI-style endpoint."""
    resident: Execution[Literal["best", "all"]] = "best"
    """Keep base and best student loaded and start the others on demand, or keep all."""
    max_model_len: Execution[PositiveInt] = 2048
    """Context of a served model in tokens."""
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
