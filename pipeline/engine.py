"""One warm vLLM engine: it samples, scores given responses, and reloads weights."""

import asyncio
import os
import uuid
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.errors import EngineNotReadyError
from cluster.sections import Dtype, Engines
from pipeline.models import resolve_exact
from pipeline.rows import Wanted


@dataclass(frozen=True)
class Weights:
    """A model that an engine can load: where it lies, what it is, and how to load it."""

    reference: str  # what resolve_model takes; each engine resolves it on its own node
    digest: str
    architecture: str  # digest of what must be equal for weights to be reloaded in place
    dtype: Dtype
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SampleRequest(Wanted):
    """One sample to draw."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Decoding:
    """How a model's samples are drawn, the same for all requests of a stage."""

    temperature: float
    top_p: float
    max_new_tokens: int
    end_of_turn_id: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What an engine answers to a request."""

    text: str
    finish_reason: str | None
    tokens: int
    error: str | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """A response whose log-probability after a prompt is asked."""

    key: str
    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class ScoreAnswer:
    """The log-probability of a whole response in nats, or why there is none."""

    logp: float
    error: str | None = None


class SamplingEngine:
    """One vLLM engine, a replica of the pool."""

    def __init__(self, engines: Engines, on_gpu: bool) -> None:
        self._engines, self._on_gpu = engines, on_gpu
        self._engine: Any = None
        self._digest = ""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load a model: at the start by building the engine, later by reloading its weights."""
        weights = Weights(**user_config)
        # Off the event loop, which answers health checks while a model is brought near.
        folder = await asyncio.to_thread(resolve_exact, weights.reference, weights.digest)
        if self._engine is None:
            self._engine = start_engine(folder, weights, self._engines, self._on_gpu)
        elif weights.digest != self._digest:
            self._digest = ""  # until it has the new weights it answers for none
            await self._engine.collective_rpc("take_weights", args=(str(folder),))
            await self._engine.reset_prefix_cache()
        self._digest = weights.digest

    def __del__(self) -> None:
        """Stop the engine in order; killed, it leaves shared memory and sockets. Serve calls it."""
        if self._engine is not None:
            self._engine.shutdown()

    async def check_health(self) -> None:
        """Let Ray Serve replace this replica once its engine is dead."""
        if self._engine is not None:
            await self._engine.check_health()

    async def sample(
        self, digest: str, requests: list[SampleRequest], decoding: Decoding
    ) -> list[Completion]:
        """Answer requests, in order. A request that vLLM refuses is answered with its error.

        Raises EngineNotReadyError where another model is loaded than the one with this digest, and
        where the engine has died.
        """
        self._require(digest)
        return await asyncio.gather(*(self._complete(request, decoding) for request in requests))

    async def score(self, digest: str, requests: list[ScoreRequest]) -> list[ScoreAnswer]:
        """Score responses, in order, with errors as in `sample`."""
        self._require(digest)
        return await asyncio.gather(*(self._score(request) for request in requests))

    def _require(self, digest: str) -> None:
        if digest != self._digest:
            raise EngineNotReadyError(f"the engine holds model {self._digest}, asked for {digest}")

    async def _complete(self, request: SampleRequest, decoding: Decoding) -> Completion:
        output, error = await self._generate(
            request.prompt_ids, _sampling_params(decoding, request.seed)
        )
        if error:
            return Completion("", None, 0, error)
        best = output.outputs[0]
        return Completion(best.text, best.finish_reason, len(best.token_ids))

    async def _score(self, request: ScoreRequest) -> ScoreAnswer:
        ids = request.prompt_ids + request.response_ids
        output, error = await self._generate(ids, _scoring_params())
        if error:
            return ScoreAnswer(0.0, error)
        first = len(request.prompt_ids)
        found = zip(ids[first:], output.prompt_logprobs[first:], strict=True)
        return ScoreAnswer(sum(logprobs[token].logprob for token, logprobs in found))

    async def _generate(self, ids: list[int], parameters: Any) -> tuple[Any, str | None]:
        """What vLLM makes of a prompt, or the error with which it refuses it."""
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = TokensPrompt(prompt_token_ids=ids)
        try:
            outputs = self._engine.generate(prompt, parameters, uuid.uuid4().hex)
            return [output async for output in outputs][-1], None
        except (ValueError, VLLMClientError, EngineGenerateError) as error:
            return None, f"{type(error).__name__}: {error}"
        except EngineDeadError as error:
            raise EngineNotReadyError(f"the engine died: {error}") from None


def _scoring_params() -> Any:
    """Log-probabilities of the prompt's tokens; for these vLLM reads no cached prefix."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sampling_params(decoding: Decoding, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        max_tokens=decoding.max_new_tokens,
        seed=seed,
        stop=list(decoding.stop) or None,
        stop_token_ids=[decoding.end_of_turn_id],
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def start_engine(folder: Path, weights: Weights, engines: Engines, on_gpu: bool) -> Any:
    """A vLLM engine in this process's care. Takes 20 to 40 s for a small model on a CPU."""
    if not on_gpu:
        threads = engines.cpu_threads or shared_out(os.cpu_count() or 1, engines.tensor_parallel)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = threads
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(folder),
        dtype=weights.dtype,
        trust_remote_code=weights.trust_remote_code,
        max_model_len=engines.max_model_len,
        tensor_parallel_size=engines.tensor_parallel,
        gpu_memory_utilization=engines.gpu_memory_share,
        enforce_eager=engines.enforce_eager,
        enable_prefix_caching=True,
        worker_extension_cls="pipeline.reloading.TakesWeights",
        disable_log_stats=True,
    )
    if not on_gpu:
        # A per-request seed kills the CPU engine when chunked prefill splits a prompt.
        arguments.enable_chunked_prefill = False
        arguments.max_num_batched_tokens = max(8192, engines.max_model_len)
        share = engines.kv_cache_gib / engines.tensor_parallel
        arguments.kv_cache_memory_bytes = int(share * (1 << 30))
    # Of vLLM's defaults for batches those of offline use, by device; an engine that is used as
    # AsyncLLM is gets the least of all, 128 sequences.
    return AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)


def shared_out(cores: int, processes: int) -> str:
    """A machine's cores for each process of an engine, as vLLM reads them: "0-3|4-7"."""
    firsts = [cores * rank // processes for rank in range(processes + 1)]
    return "|".join(f"{first}-{max(first, last - 1)}" for first, last in pairwise(firsts))
