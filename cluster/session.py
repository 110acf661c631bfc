"""The Ray session: a small cluster on this machine, or the one at an address."""

import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

from cluster import storage
from cluster.config import RunConfig
from cluster.digests import digest_text
from cluster.endpoint_key import refuse_open_endpoint
from cluster.errors import BadInputError, RunError
from cluster.progress import say

# Read by processes that start later; a value that the user has set is left alone.
_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Where a driver is killed, its workers stop at once, and not in the midst of its next try.
    "RAY_raylet_death_check_interval_milliseconds": "100",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# Also read on a cluster of our own, which has no dashboard: at the end of each training Ray Train
# asks that, and waits twelve seconds for an answer unless the address refuses at once.
NO_DASHBOARD = {"RAY_ADDRESS": "http://127.0.0.1:1"}
_LEAST_LOGICAL_CPUS = 8
# Served models take a share of a CPU: they are many, idle in turn, and share the cores anyhow.
CPUS_PER_SERVED_MODEL = 0.2


@contextmanager
def ray_session(config: RunConfig) -> Iterator[bool]:
    """Start or join Ray for the length of the block; gives whether all on it ends with the block.

    CPUs of a cluster of our own are logical: on a small machine there are more of them than
    cores, because Ray Serve's and Ray Train's actors each ask for one and wait for ever otherwise.
    """
    import ray

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started_here = not ray.is_initialized()
    if started_here:
        # Ray's own handler exits with 1; a polite request to stop is an interruption, as Ctrl-C is.
        handler = signal.getsignal(signal.SIGTERM)
        _start(config)
        signal.signal(signal.SIGTERM, handler)
    try:
        _check_accelerator(config)
        yield started_here and starts_own_cluster(config)
    finally:
        if started_here:
            ray.shutdown()


def _refuse_silence(address: str) -> None:
    """Raise BadInputError where nothing listens at a host and port; Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+", host) or not port.isdigit():
        return  # "auto", "local", or a URL of Ray's client
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise BadInputError(
            f"no Ray cluster answers at cluster.address={address!r} ({error}): start one with "
            "`ray start --head`, or set it to null to use this machine"
        ) from None


def _start(config: RunConfig) -> None:
    import ray

    address = _address(config)
    if address:
        _refuse_silence(address)
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        if address:
            say(f"joining Ray at {address}")
            ray.init(
                address=address,
                runtime_env={"env_vars": environment},
                logging_level=logging.ERROR,
            )
        else:
            say("starting Ray on this machine")
            ray.init(
                address="local",  # without it Ray joins a cluster that happens to run here
                num_cpus=logical_cpus(config),
                include_dashboard=False,
                runtime_env={"env_vars": environment | NO_DASHBOARD},
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError) as error:
        raise BadInputError(
            f"no Ray cluster answers at cluster.address={address!r} ({error}): start one with "
            "`ray start --head`, or set it to null to use this machine"
        ) from None


def starts_own_cluster(config: RunConfig) -> bool:
    """Whether the run starts Ray on this machine, and joins none."""
    return _address(config) is None


def _address(config: RunConfig) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def result_of(reference: Any, timeout_s: float | None = None) -> Any:
    """`ray.get`, but a mistake or a failure that an actor met is raised as itself, unwrapped."""
    import ray

    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise (own_error(error) or error) from None


def own_error(error: BaseException | None) -> BaseException | None:
    """The mistake or failure of ours that Ray, or its Data, has wrapped into errors of its own."""
    while error is not None:
        wrapped = getattr(error, "cause", None)  # Ray's, which may be of our class as well
        if wrapped is None and isinstance(error, BadInputError | RunError):
            return error
        error = wrapped or error.__cause__
    return None


def start_serve(config: RunConfig) -> None:
    """Start Ray Serve, once for a cluster, listening where `serving` says.

    Raises BadInputError where Serve already runs there and listens elsewhere, which it keeps doing,
    and where others would reach it without a key.
    """
    from ray import serve
    from ray.serve.context import _get_global_client  # there is no public way to ask for the port

    refuse_open_endpoint(config.serving.host)
    wanted = {"host": config.serving.host, "port": config.serving.port}
    serve.start(proxy_location="HeadOnly", http_options=wanted)
    running: Any = _get_global_client()
    found = {name: getattr(running.http_config, name) for name in wanted}
    if found != wanted:
        raise BadInputError(
            f"Ray Serve of this cluster listens on {found}, expected {wanted}: set serving.host "
            "and serving.port to these, or end it by `serve shutdown`"
        )


def app_name(config: RunConfig, part: str) -> str:
    """Ray Serve's name for a part of this run, which no other run on the cluster has."""
    folder = str(storage.location(config.run.folder))
    return f"potstill-{part}-{digest_text(folder)[:12]}"


def pool_name(config: RunConfig) -> str:
    """Ray Serve's names for the engines of this run start so: its own, or those it shares."""
    shared = config.engines.pool
    if shared is None:
        return app_name(config, "sampler")
    return f"potstill-sampler-{digest_text(shared)[:12]}"


def logical_cpus(config: RunConfig) -> int:
    """CPUs that a cluster of our own offers: room for all that holds some, and at least eight."""
    served = CPUS_PER_SERVED_MODEL * (config.training.epochs + 2)  # base and teacher
    least = max(_LEAST_LOGICAL_CPUS, ceil(config.cpus_held + served))
    return config.cluster.logical_cpus or max(least, os.cpu_count() or 1)


def settled(config: RunConfig) -> RunConfig:
    """The configuration with `auto` decided by the nodes that are up now, for all that follows.

    Asked again later, a run whose GPU nodes are lost would go on by the CPUs that are left.
    """
    accelerator = "gpu" if uses_gpu(config) else "cpu"
    cluster = config.cluster.model_copy(update={"accelerator": accelerator})
    return config.model_copy(update={"cluster": cluster})


def uses_gpu(config: RunConfig) -> bool:
    """Whether models run on GPUs; `auto` asks the nodes that are up now."""
    import ray

    if config.cluster.accelerator == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.cluster.accelerator == "gpu"


def _check_accelerator(config: RunConfig) -> None:
    import ray

    # A cluster that we join may start its GPU nodes only once they are asked for.
    wanted = config.cluster.accelerator == "gpu" and starts_own_cluster(config)
    if wanted and not ray.cluster_resources().get("GPU", 0):
        raise BadInputError(
            "cluster.accelerator=gpu, but this machine has no GPU: set cluster.address to a "
            "cluster with GPUs, or cluster.accelerator to cpu"
        )
