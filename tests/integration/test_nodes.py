"""Nodes that vanish under a run: several raylets on this machine, as nodes of one cluster."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.runs import Recipe, go, write_recipe

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault,
    pytest.mark.long,
    pytest.mark.timeout(1500),
]

OPTIONS = [
    "cluster.accelerator=cpu",
    "cluster.training_nodes=stage=training",
    "cluster.sampling_nodes=stage=sampling",
    "training.save_minutes=0.02",
    "training.steps_per_epoch=1000",  # an announcement takes some ten seconds to be heard of
    "evaluation.through=engines",
]


@dataclass
class Nodes:
    """A cluster whose head has a node for training and one for sampling beside it."""

    cluster: object
    latest: dict[str, object] = field(default_factory=dict)  # by stage

    def add(self, stage: str) -> None:
        self.latest[stage] = self.cluster.add_node(num_cpus=4, labels={"stage": stage})

    def replace(self, stage: str) -> None:
        """Take a node away without notice; another comes in its place."""
        self.cluster.remove_node(self.latest[stage], allow_graceful=False)
        self.add(stage)

    def announce_loss(self, stage: str) -> None:
        """Announce as a cloud does that a node will be taken away; another is there by then."""
        leaving = self.latest[stage].node_id
        self.add(stage)
        options = {
            "address": self.cluster.address,
            "node-id": leaving,
            "reason": "DRAIN_NODE_REASON_PREEMPTION",
            "reason-message": "spot",
            "deadline-remaining-seconds": 120,
        }
        ray = Path(sys.executable).with_name("ray")
        flags = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([ray, "drain-node", *flags], check=True, capture_output=True)


@pytest.fixture
def nodes(monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield Nodes(cluster)
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(guesser, free_port, tmp_path_factory, measured) -> Recipe:
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"), guesser, free_port())
    ended = go(recipe, OPTIONS[3:])
    measured(f"no node lost: {ended.seconds:.0f} s")
    assert ended.code == 0, ended.screen
    return recipe


Event = tuple[Callable[[], object], Callable[[], None]]  # when it happens, and what does


def happening(events: list[Event]) -> Callable[[str], bool]:
    """Lets events happen one after the other while a run is watched; Ray starts no node elsewhere
    than in the main thread."""

    def look(_screen: str) -> bool:
        if events and events[0][0]():
            events.pop(0)[1]()
        return False

    return look


def test_a_run_goes_on_without_the_nodes_it_loses(
    nodes, undisturbed, guesser, free_port, tmp_path, measured
):
    """A sampling node goes while the teacher is sampled, a training node in each epoch: in the
    first without notice."""
    recipe = write_recipe(tmp_path / "home", guesser, free_port())
    nodes.add("sampling")
    nodes.add("training")
    losses = [
        (recipe.keys, lambda: nodes.replace("sampling")),
        (lambda: len(recipe.steps(1)) > 50, lambda: nodes.replace("training")),
        (lambda: recipe.steps(2), lambda: nodes.announce_loss("training")),
    ]
    options = [f"cluster.address={nodes.cluster.address}", *OPTIONS]
    ended = go(recipe, options, until=happening(losses))
    measured(f"a sampling and two training nodes lost: {ended.seconds:.0f} s")
    assert ended.code == 0, ended.screen
    assert losses == [], "all of them are lost"
    assert "training lost worker 0 of 1: going on" in ended.screen
    assert "the node of worker 0 will be taken away, going on without it" in ended.screen
    assert sorted(recipe.keys()) == sorted(undisturbed.keys()), "a sample is lost, or there twice"
    for epoch in (1, 2):
        ours, theirs = recipe.losses(epoch), undisturbed.losses(epoch)
        assert ours == pytest.approx(theirs, abs=1e-6)
        pairs = [
            run / f"pairs/epoch_{epoch:03d}/pairs.parquet" for run in (recipe.run, undisturbed.run)
        ]
        assert pq.read_table(pairs[0]).equals(pq.read_table(pairs[1]))
