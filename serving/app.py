"""The Ray Serve application: one OpenAI-style endpoint over the engines of ray.serve.llm."""

from dataclasses import dataclass
from typing import Any

from cluster.config import RunConfig
from cluster.refusals import refuse_taken_port
from cluster.session import CPUS_PER_SERVED_MODEL, app_name, start_serve, uses_gpu
from cluster.waiting import waiting
from serving.models import ServedEngine, ServedModel, engines_of, routes_of
from serving.protection import protection_of
from serving.readiness import wait_until_answering, wait_until_running

_PART = "endpoint"
_GIB = 1 << 30
_GPU_MEMORY_SHARE = 0.9
_MAX_ONGOING_REQUESTS = 100_000
_WINDOW_S = 10.0  # over which Ray Serve counts requests before it stops an idle engine


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint; `url` ends with /v1, as the openai client wants it."""

    app_name: str
    url: str
    models: tuple[ServedModel, ...]
    start_timeout_s: float

    def warm(self, model_id: str) -> None:
        """Return once `model_id` answers, which starts its engine where it is on demand.

        Raises RunError with a diagnosis where the engine fails, or takes over start_timeout_s.
        """
        engine = engines_of(list(self.models))[model_id]
        with waiting(f"starting {model_id}"):
            wait_until_answering(self.app_name, self.url, model_id, engine, self.start_timeout_s)


def start_serving(models: list[ServedModel], config: RunConfig, idle_s: float = 300) -> Endpoint:
    """Serve `models` on config.serving's host and port, and return once the residents answer.

    Needs a running Ray. An engine on demand stops `idle_s` after its last request. Raises
    BadInputError for a port in use and for an open host without a key, RunError with a diagnosis
    where an engine does not start.
    """
    from ray import serve

    _start_http(config)
    name, prefix = _place(config)
    engines = _engines(models)
    target = serve.RunTarget(_application(models, engines, config, idle_s), name, prefix)
    serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    with waiting("starting the endpoint"):
        wait_until_running(name, engines, config.serving.start_timeout_s)
    url = f"{_address(config)}{prefix.rstrip('/')}/v1"
    return Endpoint(name, url, tuple(models), config.serving.start_timeout_s)


def stop_serving(config: RunConfig) -> None:
    """Take the endpoint down and wait until its engines have given back what they held."""
    from ray import serve

    name = app_name(config, _PART)
    if name in serve.status().applications:
        serve.delete(name)


def _place(config: RunConfig) -> tuple[str, str]:
    """Name and path of the endpoint: "/", or a path of its own where something else is served."""
    from ray import serve

    name = app_name(config, _PART)
    served = {app for app in serve.status().applications if not app.startswith("potstill-sampler-")}
    return name, "/" if served <= {name} else f"/{name}"


def _address(config: RunConfig) -> str:
    host = config.serving.host
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    reachable = f"[{reachable}]" if ":" in reachable else reachable
    return f"http://{reachable}:{config.serving.port}"


def _start_http(config: RunConfig) -> None:
    from ray import serve

    if not serve.status().proxies:
        refuse_taken_port(config.serving.host, config.serving.port)
    start_serve(config)


def application(models: list[ServedModel], config: RunConfig, idle_s: float = 300) -> Any:
    """The Ray Serve application of `models`, bound and not yet running. Starts no engine."""
    return _application(models, _engines(models), config, idle_s)


def _engines(models: list[ServedModel]) -> list[ServedEngine]:
    return list({engine.engine_id: engine for engine in engines_of(models).values()}.values())


def _application(
    models: list[ServedModel], engines: list[ServedEngine], config: RunConfig, idle_s: float
) -> Any:
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from serving.ingress import ingress_class

    configs = {
        engine.engine_id: LLMConfig(**_engine_options(engine, config, idle_s)) for engine in engines
    }
    deployments = {name: build_llm_deployment(configs[name]) for name in configs}
    routes = routes_of(models)
    ingress: Any = serve.deployment(
        ingress_class(protection_of(config.serving)),
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(
        routes=routes,
        llm_deployments={name: deployments[route.engine] for name, route in routes.items()},
        model_cards={
            name: to_model_metadata(name, configs[route.engine]) for name, route in routes.items()
        },
    )


def _engine_options(engine: ServedEngine, config: RunConfig, idle_s: float) -> dict[str, Any]:
    on_gpu = uses_gpu(config)
    hardware = _on_gpu(config) if on_gpu else _on_cpu(config)
    model = engine.model
    arguments = {
        "dtype": model.dtype,
        "max_model_len": config.serving.max_model_len,
        "trust_remote_code": model.trust_remote_code,
        "generation_config": "vllm",  # no sampling defaults of the folder's own, EOS ids apart
        **hardware.pop("engine_kwargs"),
    }
    if model.chat_template is not None:
        arguments["chat_template"] = model.chat_template
    return {
        "model_loading_config": {"model_id": engine.engine_id, "model_source": model.reference},
        "callback_config": {
            "callback_class": "serving.fetching.FetchModel",
            "callback_kwargs": {"reference": model.reference, "digest": model.digest},
        },
        "engine_kwargs": arguments,
        "deployment_config": _deployment(engine.resident, idle_s),
        **hardware,
    }


def _deployment(resident: bool, idle_s: float) -> dict[str, Any]:
    return {
        "autoscaling_config": {
            "min_replicas": 1 if resident else 0,
            "max_replicas": 1,
            "downscale_delay_s": idle_s,
            "look_back_period_s": _WINDOW_S,
            "metrics_interval_s": _WINDOW_S / 5,
        },
        "ray_actor_options": {"num_cpus": 0},
        # Cores that several engines share answer a health check late without being ill.
        "health_check_period_s": 30,
        "health_check_timeout_s": 120,
        "graceful_shutdown_timeout_s": 5,
    }


def _on_cpu(config: RunConfig) -> dict[str, Any]:
    threads = (config.engines.cpu_threads or "auto").replace("|", ",")  # of one process
    # "auto" leaves a core to the scheduler unless told to reserve none.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": threads, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    return {
        "engine_kwargs": {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(config.serving.kv_cache_gib * _GIB),
        },
        "runtime_env": {"env_vars": binding},
        "placement_group_config": {"bundles": [{"CPU": CPUS_PER_SERVED_MODEL}]},
    }


def _on_gpu(config: RunConfig) -> dict[str, Any]:
    gpus = config.serving.gpus_per_model
    return {
        "engine_kwargs": {
            "gpu_memory_utilization": _GPU_MEMORY_SHARE * min(gpus, 1),
            "tensor_parallel_size": max(1, int(gpus)),
        },
        "placement_group_config": {
            "bundle_per_worker": {"GPU": min(gpus, 1), "CPU": CPUS_PER_SERVED_MODEL}
        },
    }
