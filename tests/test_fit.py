"""What finds no room on a cluster is refused, with the changes that would make it fit."""

import re
from contextlib import suppress

import pytest
import yaml

from cluster.errors import BadInputError
from cluster.nodes import place
from pipeline.fit import check_caches, check_folders, check_labels, misfits
from pipeline.needs import engines, trainers

GPU = {"cpus": 16, "memory_gib": 128, "gpus": 4, "gpu_memory_gib": 80}


def test_what_fits_is_not_refused(known):
    assert list(misfits(known())) == []


def test_nothing_is_refused_where_nodes_are_not_known(known):
    assert list(misfits(known(nodes=(), training={"workers": 8}))) == []


def test_gpus_that_are_nowhere_are_one_refusal(known):
    (refusal,) = misfits(known([{"name": "plain", "cpus": 8, "memory_gib": 32}]))
    assert refusal.startswith("cluster.accelerator=gpu, but plain (8 CPUs, 32 GiB) has no GPU")


def test_trainers_that_leave_no_room_to_resample_are_refused(known):
    (refusal,) = misfits(known(training={"workers": 4}))
    assert refusal.startswith("No room for 1 engine of the teacher, each with 1 CPU, 1 GPU, ")
    assert "beside 4 training workers of the student" in refusal
    assert "engines sample and score between epochs, while trainers hold their place" in refusal
    assert "It fits with training.min_workers=1, or with training.workers=2" in refusal
    assert "release" not in refusal.partition("It fits")[2], "trainers would still hold their place"
    assert list(misfits(known(training={"workers": 2}))) == []
    larger = {"name": "more", **GPU}
    assert list(misfits(known([{"name": "all", **GPU}, larger], training={"workers": 4}))) == []


def test_engines_that_only_stay_warm_may_be_released(known):
    quiet = {"training": {"workers": 4}, "pairs": {"phi": 0}}
    (refusal,) = misfits(known(**quiet))
    assert "engines stay warm beside trainers (engines.between_epochs=keep)" in refusal
    assert "It fits with" in refusal
    assert "engines.between_epochs=release" in refusal
    assert list(misfits(known(**quiet, engines={"between_epochs": "release"}))) == []


def test_scores_between_epochs_need_room_as_well(known):
    scored = {"training": {"workers": 4, "method": "dadpo"}, "pairs": {"phi": 0}}
    released = {"engines": {"between_epochs": "release"}}
    assert len(list(misfits(known(**scored, **released)))) == 1
    once = {**scored, "training": {"workers": 4, "method": "dadpo", "epochs": 1}}
    assert list(misfits(known(**once, **released))) == []


def test_a_trainer_too_large_is_told_what_would_fit(known):
    small = {"name": "all", **GPU, "gpu_memory_gib": 19}
    (refusal,) = misfits(known([small], student="1.5", training={"workers": 2}))
    assert re.match(r"No room for 2 training workers of the student, .* \(weights 2\.9,", refusal)
    ways = refusal.partition("It fits with ")[2].partition("; or with more or larger nodes")[0]
    assert "training.zero_stage=2 and training.offload=optimizer and" in ways
    for way in ways.split(", or with "):
        found = re.findall(r"training\.(\w+)=(\{.*?\}|\w+)", way)
        options = {name: yaml.safe_load(value) for name, value in found}
        changed = known([small], student="1.5", training={"workers": 2} | options)
        assert list(misfits(changed)) == [], way
        for left_out in options:  # no change is named that is not needed
            fewer = {name: value for name, value in options.items() if name != left_out}
            with suppress(BadInputError):  # offload needs ZeRO
                assert list(misfits(known([small], student="1.5", training={"workers": 2} | fewer)))


def test_an_engine_too_large_may_be_spread_over_gpus(known):
    small = {"name": "all", **GPU, "gpu_memory_gib": 12}
    refusals = list(misfits(known([small], training={"epochs": 0})))
    assert refusals[0].startswith("No room for 1 engine of the teacher")
    assert "It fits with engines.tensor_parallel=2" in refusals[0]
    assert "served model of the teacher" in refusals[1]
    spread = {"engines": {"tensor_parallel": 2}, "serving": {"gpus_per_model": 2}}
    assert list(misfits(known([small], training={"epochs": 0}, **spread))) == []


def test_where_no_change_helps_more_nodes_are_asked_for(known):
    tiny = {"name": "all", "cpus": 1, "memory_gib": 1, "gpus": 1, "gpu_memory_gib": 1}
    first, *_ = misfits(known([tiny]))
    assert "No change by itself makes it fit (" in first
    assert "or more or larger nodes" in first


def test_each_stage_stays_on_its_nodes(known):
    groups = [
        {"name": "large", **GPU, "labels": "stage=training"},
        {"name": "small", **GPU, "gpus": 1, "labels": "stage=sampling"},
    ]
    cluster = {"training_nodes": "stage=training", "sampling_nodes": "stage=sampling"}
    placed = known(groups, cluster, training={"workers": 4})
    assert list(misfits(placed)) == []
    both = [trainers(placed), engines(placed, "student", 1)]
    assert place(both, placed.nodes) == {"large": 1, "small": 1}
    two = known(groups, cluster, engines={"min_engines": 2, "max_engines": 2})
    assert any("No room for 2 engines of the teacher" in line for line in misfits(two))


def test_labels_on_no_group_are_refused(known):
    groups = [{"name": "large", **GPU, "labels": "stage=training"}]
    check_labels(known(groups, {"training_nodes": "stage=training"}).config, known(groups).nodes)
    wrong = known(groups, {"training_nodes": "stage=train"}).config
    with pytest.raises(
        BadInputError, match=r"training_nodes='stage=train' is on no .*large: stage=training"
    ):
        check_labels(wrong, known(groups).nodes)


@pytest.mark.parametrize(
    ("folder", "store", "refused"),
    [
        ("s3://bucket/run", "s3://bucket/store", None),
        ("runs/x", "s3://bucket/store", "run.folder=runs/x is on a disk of one node"),
        ("s3://bucket/run", "/store", "run.store=/store is on a disk of one node"),
        ("file:///mnt/run", "file:///mnt/store", None),
    ],
)
def test_a_run_kept_on_one_of_many_nodes_is_refused(known, folder, store, refused):
    one, two = ({"name": "all", **GPU, "max_count": count} for count in (1, 2))
    config = known([two]).config
    run = config.run.model_copy(update={"folder": folder, "store": store})
    config = config.model_copy(update={"run": run})
    check_folders(config, known([one]).nodes)
    if refused is None:
        check_folders(config, known([two]).nodes)
        return
    with pytest.raises(BadInputError, match=refused) as error:
        check_folders(config, known([two]).nodes)
    assert "=file:///" in str(error.value)


def test_a_machine_must_hold_trainers_and_engines(known):
    cpu = {"accelerator": "cpu"}
    machine = {"name": "machine", "cpus": 8, "memory_gib": 14}
    small = {"teacher": "0.5", "student": "0.5", "engines": {"kv_cache_gib": 1}}
    lean = {"micro_batch": 1, "gradient_checkpointing": True}
    (refusal,) = misfits(known([machine], cpu, **small, training=lean))
    assert "engine of the" in refusal
    assert "beside 1 training worker" in refusal
    roomy = machine | {"memory_gib": 24}
    assert list(misfits(known([roomy], cpu, **small, training=lean))) == []


def test_a_cache_that_holds_no_sequence_is_refused_on_cpus_alone(known):
    cache = {"engines": {"kv_cache_gib": 0.001}}
    with pytest.raises(BadInputError, match=r"engines\.kv_cache_gib=0\.001 holds no sequence"):
        check_caches(known(cluster={"accelerator": "cpu"}, **cache))
    check_caches(known(**cache))
