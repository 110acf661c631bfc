"""Elastic training without Ray: how many workers start, when more join, and when a node goes."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from cluster.config import parse_config
from cluster.errors import BadInputError
from training import elastic, worker
from training.batches import TokenPair, micro_batches
from training.stepping import Wishes


def config(*, cluster=None, engines=None, pairs=None, **training):
    raw = {
        "run": {"folder": "run"},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
        "cluster": cluster or {},
        "engines": engines or {},
        "pairs": pairs or {},
        "training": {"workers": 8, "min_workers": 2, "micro_batch": 1, "global_batch": 8}
        | training,
    }
    return parse_config(raw, "test")


class Cluster:
    """Nodes of four CPUs for training and one for sampling, as placement groups see them."""

    def __init__(self, training_cpus=4.0, pool=()):
        self.free = {"training": training_cpus, "sampling": 1.0}
        self.pool, self.asked, self.held = list(pool), [], []

    def placement_group(self, bundles, bundle_label_selector):
        self.asked.append(list(zip(bundles, bundle_label_selector, strict=True)))
        group = SimpleNamespace(wanted=self.asked[-1])
        group.wait = lambda timeout_seconds: self.fits(group)
        group.ready = lambda: group
        self.held.append(group)
        return group

    def fits(self, group):
        taken = {"training": 0.0, "sampling": 0.0}
        for resources, labels in group.wanted:
            node = labels.get("stage") or next(
                n for n in ("training", "sampling") if taken[n] < self.free[n] or n == "sampling"
            )
            taken[node] += resources["CPU"]
        return all(taken[node] <= self.free[node] for node in taken)

    def wait(self, groups, timeout):
        there = [group for group in groups if self.fits(group)]
        return there, [group for group in groups if group not in there]


class OnePair(list):
    """The examples of an epoch."""

    def __init__(self):
        super().__init__([0])

    def batch(self, indices):
        return [self[index] for index in indices]


@pytest.fixture
def cluster(monkeypatch):
    cluster = Cluster()
    monkeypatch.setattr("ray.util.placement_group", cluster.placement_group)
    monkeypatch.setattr("ray.util.remove_placement_group", cluster.held.remove)
    monkeypatch.setattr("ray.wait", cluster.wait)
    monkeypatch.setattr(elastic, "running_apps", lambda config: cluster.pool)
    return cluster


@pytest.mark.fault
@pytest.mark.parametrize(("cpus", "workers"), [(9, 8), (8, 8), (5, 5), (3, 3), (2, 2), (0, 2)])
def test_as_many_start_as_find_room_and_never_fewer_than_the_least(cpus, workers, cluster):
    cluster.free, cluster.pool = {"training": cpus, "sampling": 0}, ["engines"]
    assert elastic.workers_with_room(config(), on_gpu=False) == workers
    assert cluster.held == [], "what was asked for is given back"


def test_without_a_least_number_nothing_is_asked_and_all_start(cluster):
    assert elastic.workers_with_room(config(min_workers=None), on_gpu=False) == 8
    assert cluster.asked == []


def test_nodes_of_other_labels_are_no_room(cluster):
    cluster.free["sampling"] = 100
    placed = config(cluster={"training_nodes": "stage=training"}, pairs={"phi": 0})
    assert elastic.workers_with_room(placed, on_gpu=False) == 4
    assert elastic.workers_with_room(config(pairs={"phi": 0}), on_gpu=False) == 8


@pytest.mark.parametrize(
    ("more", "workers"),
    [
        ({}, 3),
        ({"pairs": {"phi": 0}}, 4),
        ({"method": "sft"}, 4),
        ({"epochs": 1}, 4),
        ({"cluster": {"sampling_nodes": "stage=sampling"}}, 4),
    ],
)
def test_room_is_left_for_engines_that_sample_later(more, workers, cluster):
    cluster.free["sampling"] = 1 if "cluster" in more else 0
    assert elastic.workers_with_room(config(**more), on_gpu=False) == workers
    cluster.pool = ["engines"]  # which hold what they need
    assert elastic.workers_with_room(config(**more), on_gpu=False) in (4, 5)


def test_a_worker_and_an_engine_on_gpus_ask_for_them(cluster):
    elastic.MissingWorkers(config(engines={"tensor_parallel": 2}), True, present=7)
    assert [resources for resources, _ in cluster.asked[0]] == [
        {"CPU": 1, "GPU": 1},
        {"CPU": 2, "GPU": 2},
    ]


def test_those_that_are_missing_are_asked_for_until_they_find_room(cluster):
    cluster.pool = ["engines"]
    missing = elastic.MissingWorkers(config(), False, present=2)
    assert len(cluster.asked[0]) == 6
    assert not missing.find_room()
    assert cluster.held, "still asked for"
    cluster.free["training"] = 6
    assert missing.find_room()
    assert cluster.held == [], "given back for the next start"
    assert not missing.find_room(), "said once"


def test_their_room_is_for_engines_while_these_sample(cluster):
    cluster.pool, cluster.free["training"] = ["engines"], 6
    missing = elastic.MissingWorkers(config(), False, present=2)
    missing.withdraw()
    assert cluster.held == []
    assert not missing.find_room()
    missing.ask()
    missing.ask()
    assert len(cluster.held) == 1
    assert missing.find_room()


@pytest.mark.parametrize(("least", "present"), [(None, 2), (2, 8)])
def test_nobody_is_missing(least, present, cluster):
    assert not elastic.MissingWorkers(config(min_workers=least), False, present).find_room()
    assert cluster.asked == []


def test_more_workers_at_least_than_at_most_are_refused():
    with pytest.raises(BadInputError, match=r"min_workers=9 is more than workers=8: lower it"):
        config(min_workers=9)


@pytest.mark.parametrize("workers", range(1, 9))
def test_any_number_of_workers_takes_the_whole_global_batch(workers):
    batch = [TokenPair(f"p{n}", [1], [2] * (n + 1), None) for n in range(8)]
    shares = [micro_batches(batch, 1, workers, rank) for rank in range(workers)]
    assert len({len(share) for share in shares}) == 1, "all take as many micro-batches"
    learned = [p.prompt_id for share in shares for m in share if not m.filler for p in m.pairs]
    assert sorted(learned) == sorted(pair.prompt_id for pair in batch)


class Announced:
    """A worker in the midst of an epoch of ten steps, on which Ray Train looks at its nodes."""

    def __init__(self, monkeypatch, first, notices, wishes):
        self.calls, self.saved = 0, []
        monkeypatch.setattr("ray.train.get_preemption_info", self.look)
        monkeypatch.setattr(worker, "say", lambda text: self.calls and None)
        monkeypatch.setattr(worker, "global_batches", lambda *_: [[0]] * 10)
        self.notices = iter(notices)
        made = worker.Worker.__new__(worker.Worker)
        made.first, made.rank = first, 0 if first else 1
        made.config, made.training = config(), config().training
        made.assignment = SimpleNamespace(board=None)
        made.pairs_per_epoch, made.steps, made.step = 1, 10, 0
        made.log = MagicMock()
        made.looked_at = 0.0
        made.stepper = SimpleNamespace(take=lambda *_: (wishes, {}))
        made._examples = lambda epoch: OnePair()
        made._wishes = lambda: None
        made._save = lambda: self.saved.append(made.step)
        self.worker = made

    def look(self):
        self.calls += 1
        return next(self.notices)


NOTICE = SimpleNamespace(preempted_ranks=[1], deadline_ms=None)


@pytest.mark.fault
@pytest.mark.parametrize("first", [True, False])
def test_an_announced_loss_of_a_node_saves_and_leaves_it(first, monkeypatch):
    look = Wishes(save=False, stop=False, look=True)
    announced = Announced(monkeypatch, first, [None, None, NOTICE], look)
    assert announced.worker._train_epoch(1) is False
    assert announced.saved == [3], "all workers save, for each holds a part"


def test_nodes_are_looked_at_only_when_worker_0_asks_all_to(monkeypatch):
    announced = Announced(monkeypatch, True, [], Wishes(save=False, stop=False, look=False))
    assert announced.worker._train_epoch(1) is True
    assert announced.calls == 0


@pytest.mark.fault
def test_worker_0_asks_for_a_look_every_few_seconds_and_leaves_for_more_workers(monkeypatch):
    monkeypatch.setattr(worker, "say", lambda text: None)
    made = worker.Worker.__new__(worker.Worker)
    made.first, made.training = True, config(save_minutes=1).training
    made.assignment = SimpleNamespace(board=None)
    room = iter([False, False, True])
    made.missing = SimpleNamespace(find_room=lambda: next(room))
    made.saved_at = made.looked_at = 100.0
    times = iter([104.0, 106.0, 107.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    assert made._wishes() == Wishes(save=False, stop=False, look=False)
    assert made._wishes() == Wishes(save=False, stop=False, look=True)
    assert made._wishes() == Wishes(save=True, stop=True, look=True)
