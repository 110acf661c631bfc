"""A pool of warm vLLM engines, as a Ray Serve deployment that samples and reloads weights.

Ray Serve keeps the pool between its two sizes, replaces an engine that died, and hands new weights
to every engine of the pool (`user_config`), those included that start later.
"""

import asyncio
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.errors import EngineNotReadyError, RunError
from cluster.progress import say
from cluster.sections import Dtype, Engines
from cluster.session import app_name, start_serve
from cluster.storage import digest_text
from cluster.waiting import waiting
from pipeline.models import resolve_exact
from pipeline.rows import Wanted

_DEPLOYMENT = "SamplingEngine"


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
        if digest != self._digest:
            raise EngineNotReadyError(f"the engine holds model {self._digest}, asked for {digest}")
        return await asyncio.gather(*(self._complete(request, decoding) for request in requests))

    async def _complete(self, request: SampleRequest, decoding: Decoding) -> Completion:
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = TokensPrompt(prompt_token_ids=request.prompt_ids)
        parameters = _sampling_params(decoding, request.seed)
        try:
            outputs = self._engine.generate(prompt, parameters, uuid.uuid4().hex)
            final = [output async for output in outputs][-1]
        except (ValueError, VLLMClientError, EngineGenerateError) as error:
            return Completion("", None, 0, f"{type(error).__name__}: {error}")
        except EngineDeadError as error:
            raise EngineNotReadyError(f"the engine died: {error}") from None
        best = final.outputs[0]
        return Completion(best.text, best.finish_reason, len(best.token_ids))


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
        threads = engines.cpu_threads or f"0-{(os.cpu_count() or 1) - 1}"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = threads
    from vllm.engine.arg_utils import AsyncEngineArgs
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
        arguments.kv_cache_memory_bytes = int(engines.kv_cache_gib * (1 << 30))
    return AsyncLLM.from_engine_args(arguments)


def ensure_engines(config: RunConfig, weights: Weights, on_gpu: bool) -> Any:
    """A handle of the pool with `weights` loaded; an engine that can reload them is kept warm.

    Raises RunError with a diagnosis where the pool is not ready in engines.start_timeout_s.
    """
    from ray import serve

    start_serve(config)
    name = f"{app_name(config, 'sampler')}-{weights.architecture[:12]}-{weights.dtype}"
    for app in running_apps(config):
        if app != name:
            serve.delete(app)
    if name not in running_apps(config):
        say(f"starting {config.engines.min_engines} sampling engine(s)")
    app = _deployment(config.engines, on_gpu, weights).bind(config.engines, on_gpu)
    return _run_app(app, name, config, on_gpu)


def _run_app(app: Any, name: str, config: RunConfig, on_gpu: bool) -> Any:
    from ray import serve

    engines = config.engines
    # serve.run has no time limit of its own.
    started = ThreadPoolExecutor(1).submit(serve.run, app, name=name, route_prefix=None)
    try:
        with waiting("starting sampling engines"):
            return started.result(timeout=engines.start_timeout_s)
    except (TimeoutError, RuntimeError) as error:
        raise RunError(_diagnosis(name, engines, on_gpu, error)) from None


def _diagnosis(name: str, engines: Engines, on_gpu: bool, error: Exception) -> str:
    import ray
    from ray import serve

    status = serve.status().applications[name]
    messages = [deployment.message for deployment in status.deployments.values()]
    return (
        f"sampling engines are {status.status} after at most {engines.start_timeout_s:.0f} s: "
        f"{' '.join([status.message, *messages, str(error)]).strip()} Asked for "
        f"{engines.min_engines} x {_resources(engines, on_gpu)}; the cluster has "
        f"{ray.cluster_resources()}, of which {ray.available_resources()} are free"
    )


def _deployment(engines: Engines, on_gpu: bool, weights: Weights) -> Any:
    from ray import serve

    per_node: dict[str, Any] = {}
    if engines.engines_per_node:
        per_node["max_replicas_per_node"] = engines.engines_per_node
    pool: Any = serve.deployment(
        SamplingEngine,
        name=_DEPLOYMENT,
        user_config=asdict(weights),
        ray_actor_options=_resources(engines, on_gpu),
        max_ongoing_requests=2 * engines.batches_in_flight,
        autoscaling_config={
            "min_replicas": engines.min_engines,
            "max_replicas": engines.max_engines,
            "target_ongoing_requests": engines.batches_in_flight,
        },
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=30,  # what an engine on busy cores may take to stop in order
        **per_node,
    )
    # Engines of an equal version are handed new weights. Serve has no public name for it, and else
    # makes one up at each deployment, so that every engine would start anew.
    version = digest_text(weights.architecture, weights.dtype, repr(engines), repr(on_gpu))
    return pool.options(version=version, _internal=True)


def _resources(engines: Engines, on_gpu: bool) -> dict[str, float]:
    processes = engines.tensor_parallel
    cpus = {"num_cpus": engines.cpus_per_engine * processes}
    return cpus | ({"num_gpus": processes} if on_gpu else {})


def running_apps(config: RunConfig) -> list[str]:
    """Names of the run's pools that are up now."""
    from ray import serve

    ours = app_name(config, "sampler")
    return [name for name in serve.status().applications if name.startswith(ours)]


def release_engines(config: RunConfig) -> None:
    """Give back what the run's pools hold."""
    from ray import serve

    for name in running_apps(config):
        serve.delete(name)
