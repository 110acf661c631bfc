"""The pool of warm engines, as a Ray Serve deployment.

Ray Serve keeps the pool between its two sizes, replaces an engine that died, and hands new weights
to every engine of the pool (`user_config`), those included that start later.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from cluster.config import RunConfig
from cluster.digests import digest_text
from cluster.errors import RunError
from cluster.placement import label_selector
from cluster.progress import say
from cluster.session import pool_name, start_serve
from cluster.waiting import waiting
from pipeline.engine import SamplingEngine, Weights

_DEPLOYMENT = "SamplingEngine"


def ensure_engines(config: RunConfig, weights: Weights, on_gpu: bool) -> Any:
    """A handle of the pool with `weights` loaded; an engine that can reload them is kept warm.

    Raises RunError with a diagnosis where the pool is not ready in engines.start_timeout_s.
    """
    from ray import serve

    start_serve(config)
    name = f"{pool_name(config)}-{weights.architecture[:12]}-{weights.dtype}"
    for app in running_apps(config):
        if app != name:
            serve.delete(app)
    if name not in running_apps(config):
        say(f"starting {config.engines.min_engines} sampling engine(s)")
    app = _deployment(config, on_gpu, weights).bind(config.engines, on_gpu)
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
        raise RunError(_diagnosis(name, config, on_gpu, error)) from None


def _diagnosis(name: str, config: RunConfig, on_gpu: bool, error: Exception) -> str:
    import ray
    from ray import serve

    engines = config.engines
    status = serve.status().applications[name]
    messages = [deployment.message for deployment in status.deployments.values()]
    return (
        f"sampling engines are {status.status} after at most {engines.start_timeout_s:.0f} s: "
        f"{' '.join([status.message, *messages, str(error)]).strip()} Asked for "
        f"{engines.min_engines} x {engine_resources(config, on_gpu)}; the cluster has "
        f"{ray.cluster_resources()}, of which {ray.available_resources()} are free"
    )


def _deployment(config: RunConfig, on_gpu: bool, weights: Weights) -> Any:
    from ray import serve

    engines = config.engines
    per_node: dict[str, Any] = {}
    if engines.engines_per_node:
        per_node["max_replicas_per_node"] = engines.engines_per_node
    pool: Any = serve.deployment(
        SamplingEngine,
        name=_DEPLOYMENT,
        user_config=asdict(weights),
        ray_actor_options=engine_resources(config, on_gpu),
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


def engine_resources(config: RunConfig, on_gpu: bool) -> dict[str, Any]:
    """What one engine holds, as options of a Ray actor."""
    processes = config.engines.tensor_parallel
    options: dict[str, Any] = {"num_cpus": config.engines.cpus_per_engine * processes}
    if on_gpu:
        options["num_gpus"] = processes
    if nodes := label_selector(config.cluster.sampling_nodes):
        options["label_selector"] = nodes
    return options


def running_apps(config: RunConfig) -> list[str]:
    """Names of the run's pools that are up now."""
    from ray import serve

    ours = f"{pool_name(config)}-"
    return [name for name in serve.status().applications if name.startswith(ours)]


def release_engines(config: RunConfig) -> None:
    """Give back what the run's pools hold."""
    from ray import serve

    for name in running_apps(config):
        serve.delete(name)
