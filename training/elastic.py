"""Elastic training: how many workers find room now, and when those that are missing would.

Placement groups tell. Ray Train's own range of workers goes by what nodes have in all: it sees
neither what engines hold there nor the labels that workers ask for (docs/decisions/007).
"""

from typing import Any

from cluster.config import RunConfig
from cluster.placement import label_selector
from pipeline.pairs import draws_from_latest
from pipeline.pool import engine_resources, running_apps

_PATIENCE_S = 5  # for room that is there, but was held until just now

Bundle = tuple[dict[str, float], dict[str, str]]  # resources, and the labels of nodes that may give


def worker_resources(config: RunConfig, on_gpu: bool) -> dict[str, float]:
    """What one training worker holds."""
    return {"CPU": config.training.cpus_per_worker} | ({"GPU": 1} if on_gpu else {})


def workers_with_room(config: RunConfig, on_gpu: bool) -> int:
    """With how many workers training starts: the most, up to training.workers, that find room now.

    Never fewer than training.min_workers, for which Ray Train waits, nor fewer than all without it.
    """
    least, most = config.training.least_workers, config.training.workers
    while least < most:
        middle = (least + most + 1) // 2
        asked = _ask_for(middle, config, on_gpu)
        least, most = (middle, most) if asked.wait(_PATIENCE_S) else (least, middle - 1)
        _give_back(asked)
    return least


class MissingWorkers:
    """Asks the cluster, and so its autoscaler, for the workers that training started without.

    Worker 0 holds it: what it asks for goes when that worker does.
    """

    def __init__(self, config: RunConfig, on_gpu: bool, present: int) -> None:
        self._config, self._on_gpu = config, on_gpu
        self._asked: Any = None
        training = config.training
        self._count = training.workers - present if training.min_workers else 0
        self.ask()

    def ask(self) -> None:
        """Ask for all that are missing, if any are."""
        if self._count and self._asked is None:
            self._asked = _ask_for(self._count, self._config, self._on_gpu)
            self._ready = self._asked.ready()

    def withdraw(self) -> None:
        """Give back what was asked for, while engines have need of the room."""
        if self._asked is not None:
            _give_back(self._asked)
            self._asked = None

    def find_room(self) -> bool:
        """Whether there is room for all of them now. It is given back, for a new start to take."""
        import ray

        if self._asked is None or not ray.wait([self._ready], timeout=0)[0]:
            return False
        self.withdraw()
        return True


def _ask_for(workers: int, config: RunConfig, on_gpu: bool) -> Any:
    """A placement group of so many workers, beside the engines that will still need room."""
    from ray.util import placement_group

    worker = worker_resources(config, on_gpu), label_selector(config.cluster.training_nodes)
    bundles = [*[worker] * workers, *_engines_to_come(config, on_gpu)]
    return placement_group(
        [resources for resources, _ in bundles],
        bundle_label_selector=[labels for _, labels in bundles],
    )


def _engines_to_come(config: RunConfig, on_gpu: bool) -> list[Bundle]:
    """Engines that are not up now, and that a later epoch's negatives will be asked of."""
    epochs = range(2, config.training.epochs + 1)
    resamples = any(draws_from_latest(epoch, config.pairs.phi_in(epoch)) for epoch in epochs)
    if not (config.contrasts and resamples) or running_apps(config):
        return []
    asked = engine_resources(config, on_gpu)
    resources = {"CPU": asked["num_cpus"]} | ({"GPU": asked["num_gpus"]} if on_gpu else {})
    return [(resources, asked.get("label_selector", {}))] * config.engines.min_engines


def _give_back(asked: Any) -> None:
    from ray.util import remove_placement_group

    remove_placement_group(asked)
