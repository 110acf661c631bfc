"""What a run asks of its cluster, before any Ray starts."""

import pytest

from cluster import session
from cluster.config import parse_config
from cluster.errors import BadInputError
from cluster.refusals import refuse_disks_of_nodes


@pytest.fixture(autouse=True)
def no_gpu_is_up(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def config(**sections):
    raw = {
        "run": {"folder": "run"},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
    }
    return parse_config(raw | sections, "test")


def test_a_joined_cluster_may_start_its_gpus_later():
    wanted = config(cluster={"accelerator": "gpu", "address": "auto"})
    session._check_accelerator(wanted)
    assert session.uses_gpu(wanted)


def test_a_machine_without_a_gpu_is_refused_gpus():
    with pytest.raises(BadInputError, match=r"this machine has no GPU: set cluster\.address"):
        session._check_accelerator(config(cluster={"accelerator": "gpu"}))


def test_auto_takes_what_is_up():
    assert not session.uses_gpu(config())


def node(machine, alive=True):
    return {"NodeManagerAddress": machine, "Alive": alive}


def test_a_path_on_one_of_several_machines_is_refused(monkeypatch):
    nodes = [node("10.0.0.1"), node("10.0.0.1"), node("10.0.0.2", alive=False)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    refuse_disks_of_nodes(config())
    nodes.append(node("10.0.0.3"))
    with pytest.raises(BadInputError, match=r"run\.folder=run is .* and the cluster has 2: give"):
        refuse_disks_of_nodes(config())
    refuse_disks_of_nodes(config(run={"folder": "file:///shared/run", "store": "s3://a/b"}))


@pytest.mark.parametrize("gpus", [0.0, 4.0])
def test_what_auto_has_found_stays_when_nodes_go(gpus, monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus})
    found = session.settled(config())
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 4.0 - gpus})
    assert session.uses_gpu(found) == bool(gpus)


@pytest.mark.parametrize(
    ("sections", "cpus"),
    [
        ({}, 8),
        ({"engines": {"max_engines": 4, "tensor_parallel": 2}, "training": {"workers": 2}}, 12),
        ({"training": {"epochs": 60}}, 15),  # 62 served models, an engine and a worker
        ({"cluster": {"logical_cpus": 3}}, 3),
    ],
)
def test_a_cluster_of_our_own_has_room_for_all(sections, cpus, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert session.logical_cpus(config(**sections)) == cpus
