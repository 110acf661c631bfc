"""What a run may not ask of the cluster that it starts or joins: told before any work begins."""

import socket

from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.session import logical_cpus
from cluster.storage import is_local, location

_FILE_URL = "file://"


def refuse_taken_port(host: str, port: int) -> None:
    """Raise BadInputError where something listens on the port already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadInputError(
                f"serving.host={host}, port={port} cannot be listened on ({error.strerror}): stop "
                "what uses it, or set serving.port to a free one"
            ) from None


def refuse_too_few_cpus(config: RunConfig) -> None:
    """Raise BadInputError where a cluster of our own is told to offer fewer CPUs than are held."""
    offered = logical_cpus(config)
    if config.cpus_held > offered:
        raise BadInputError(
            f"engines and training workers hold {config.cpus_held:g} logical CPUs, of which "
            f"cluster.logical_cpus={offered} offers too few: raise it, or lower "
            "engines.max_engines, engines.cpus_per_engine, training.workers or "
            "training.cpus_per_worker"
        )


def refuse_labels(config: RunConfig) -> None:
    """Raise BadInputError where nodes are chosen by label: a cluster of our own has none."""
    for option in ("training_nodes", "sampling_nodes"):
        labels = getattr(config.cluster, option)
        if labels is not None:
            raise BadInputError(
                f"cluster.{option}={labels!r}, but the cluster that starts on this machine has no "
                "labels: set it to null, or set cluster.address to a cluster that has them"
            )


def refuse_nodes(config: RunConfig) -> None:
    """Raise BadInputError where nodes are described, and the run starts Ray on this machine."""
    if config.cluster.nodes:
        raise BadInputError(
            "cluster.nodes describes a cluster that is joined, but the run starts one on this "
            "machine: set cluster.address to auto, as a job has it, or remove cluster.nodes"
        )


def refuse_disks_of_nodes(config: RunConfig) -> None:
    """Raise BadInputError where the cluster is on several machines and the run on one's disk."""
    import ray

    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1:
        refuse_one_disk(config, f"the cluster has {len(machines)}")


def refuse_one_disk(config: RunConfig, count: str) -> None:
    """Raise BadInputError where run.folder or run.store is a path that other nodes may not have."""
    for option, text in {"run.folder": config.run.folder, "run.store": config.run.store}.items():
        place = location(text)
        if is_local(place) and not text.startswith(_FILE_URL):
            raise BadInputError(
                f"{option}={text} is on a disk of one node, and {count}: give a URL such as "
                "s3://bucket/run, or, where all nodes share that disk, "
                f"{option}={_FILE_URL}{place}"
            )
