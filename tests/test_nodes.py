"""Where processes find room: on nodes by their CPUs, GPUs, memory and labels."""

import pytest

from cluster.config import parse_config, recipe_of
from cluster.errors import BadInputError
from cluster.memory import GIB, Memory
from cluster.nodes import Demand, describe, place
from cluster.placement import matches
from cluster.sections import Nodes


def nodes(name, **more):
    return Nodes(**({"name": name, "cpus": 8, "memory_gib": 32} | more))


TRAINING = nodes("training", max_count=2, gpus=4, gpu_memory_gib=24, labels="stage=training")
SAMPLING = nodes("sampling", max_count=8, gpus=1, gpu_memory_gib=16, labels="stage=sampling")
GROUPS = [nodes("head"), TRAINING, SAMPLING]


def demand(count=1, host=1.0, gpu=10.0, **more):
    memory = Memory({"all": host * GIB}, {"all": gpu * GIB})
    return Demand(
        **({"what": "worker", "model": "student", "count": count, "cpus": 1, "gpus": 1} | more),
        memory=memory,
    )


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (demand(4), {"training": 1}),
        (demand(5), {"training": 2}),
        (demand(9), {"training": 2, "sampling": 1}),
        (demand(17), None),
        (demand(9, selector="stage=training"), None),
        (demand(9, selector="stage!=training"), None),
        (demand(8, selector="stage=sampling"), {"sampling": 8}),
        (demand(1, gpu=17, selector="stage=sampling"), None),
        (demand(1, gpu=15, gpu_share=0.9, selector="stage=sampling"), None),
        (demand(1, gpus=2, selector="stage=sampling"), None),
        (demand(2, host=20, selector="stage=training"), {"training": 2}),
        (demand(3, host=20, selector="stage=training"), None),
        (demand(2, cpus=5, selector="stage=training"), {"training": 2}),
        (demand(3, per_node=1), {"training": 2, "sampling": 1}),
        (demand(1, gpus=0), {"head": 1}),
        (demand(0), {}),
    ],
)
def test_processes_are_placed(wanted, found):
    assert place([wanted], GROUPS) == found


def test_two_kinds_find_room_where_one_could_take_all_of_the_others():
    crowd, picky = demand(8), demand(1, selector="stage=training")
    assert place([crowd, picky], [TRAINING, SAMPLING]) == {"training": 2, "sampling": 1}
    assert place([demand(8), demand(1)], [TRAINING]) is None


@pytest.mark.parametrize(
    ("selector", "labels", "found"),
    [
        (None, None, True),
        ("stage=a", None, False),
        ("stage=a", "stage=a,market=spot", True),
        ("stage=a,market!=spot", "stage=a,market=spot", False),
        ("market!=spot", None, True),
    ],
)
def test_labels_match(selector, labels, found):
    assert matches(selector, labels) is found


def test_a_group_in_words():
    assert describe(TRAINING) == "2 x training (8 CPUs, 4 GPUs of 24 GiB, 32 GiB)"
    assert describe(nodes("one", cpus=1)) == "one (1 CPU, 32 GiB)"


def config(*groups):
    raw = {
        "run": {"folder": "/runs/x"},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
        "cluster": {"nodes": list(groups)},
    }
    return parse_config(raw, "test")


ONE = {"name": "one", "cpus": 8, "memory_gib": 32}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([ONE, ONE], "has one, one: give each group its own name"),
        ([ONE | {"min_count": 2}], "one: min_count=2 is more than max_count=1: lower"),
        ([ONE | {"gpus": 2}], "gpus=2 with gpu_memory_gib=None: give both"),
        ([ONE | {"gpu_memory_gib": 24}], "gpus=0 with gpu_memory_gib=24.0: give both"),
        ([ONE | {"labels": "market!=spot"}], "labels that a node has: expected label=value"),
        ([ONE | {"labels": "spot"}], "is not a list of labels"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, words):
    with pytest.raises(BadInputError, match=words):
        config(*groups)


def test_nodes_are_no_part_of_a_recipe():
    assert recipe_of(config(ONE)) == recipe_of(config())
