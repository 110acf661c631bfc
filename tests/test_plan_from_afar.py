"""The plan of a given cluster, and of what is out of reach from here."""

import io

import pytest
from rich.console import Console
from s3fs import S3FileSystem

from cluster.errors import BadInputError
from evals.runs import check_stages, refuse_stages, tell_plans
from pipeline.plan import describe_plan


def rows(plan):
    return dict(plan.rows)


@pytest.fixture
def no_hub(monkeypatch):
    import datasets
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)


HUB = "Qwen/Qwen2.5-0.5B-Instruct"
GPUS = {"name": "all", "cpus": 16, "memory_gib": 128, "gpus": 4, "gpu_memory_gib": 80}


def test_hub_models_of_the_recipes_are_planned_without_the_hub(plan_of, no_hub, tmp_path):
    hub = {"teacher": {"model": HUB}, "student": {"model": HUB}}
    cluster = {"cluster": {"accelerator": "gpu", "nodes": [GPUS]}}
    plan = plan_of(**hub, **cluster)
    assert plan.refusals == []
    assert len(plan.unseen) == 1
    assert "no route to the hub" in plan.unseen[0]
    assert rows(plan)["student"] == (
        f"{HUB}: 494 M parameters; its template and prompts are not seen"
    )
    assert rows(plan)["worker"].partition(" GiB a GPU (weights 0.9, gradients 0.9")[1]
    screen = Console(file=io.StringIO(), width=200)
    screen.print(describe_plan(plan))
    assert "not seen" in screen.file.getvalue()
    assert "1 training worker" in screen.file.getvalue()


def test_data_of_the_hub_are_planned_by_their_size(plan_of, no_hub):
    plan = plan_of(task={"name": "gsm8k", "train_prompts": None, "test_prompts": None})
    assert plan.refusals == []
    assert "openai/gsm8k could not be loaded" in plan.unseen[0]
    assert rows(plan)["sampling"].startswith(f"{7473 * 4} traces of the teacher")


def test_what_is_neither_in_reach_nor_known_is_refused(plan_of, no_hub):
    (refusal,) = plan_of(student={"model": "org/unknown"}).refusals
    assert "org/unknown is no folder here" in refusal
    task = {"name": "strategyqa", "data": "org/questions", "train_prompts": None}
    (refusal,) = plan_of(task=task).refusals
    assert "org/questions could not be loaded" in refusal


def test_a_run_does_not_start_without_what_is_out_of_reach(config_of, no_hub):
    config = config_of(student={"model": HUB})
    tell_plans([config])
    for refuse in (check_stages, refuse_stages):
        with pytest.raises(BadInputError, match="no route to the hub"):
            refuse([config])


def test_a_bucket_out_of_reach_is_left_out_of_the_plan(plan_of, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    plan = plan_of(run={"folder": "s3://bucket/run", "store": "s3://bucket/store"})
    assert plan.refusals == []
    assert any("run.folder=s3://bucket/run cannot be read" in line for line in plan.unseen)
    assert "training" in rows(plan)


def test_a_plan_tells_what_does_not_fit_the_nodes(plan_of):
    two = {"accelerator": "gpu", "nodes": [GPUS | {"max_count": 2}]}
    refusals = plan_of(cluster=two, training={"workers": 8, "global_batch": 32}).refusals
    assert refusals[0].startswith("run.folder=")
    assert "is on a disk of one node, and cluster.nodes has up to 2" in refusals[0]
    assert "No room for 1 engine" in refusals[1]
    (refusal,) = plan_of(cluster={"address": None, "nodes": [GPUS]}).refusals
    assert "cluster.nodes describes a cluster that is joined" in refusal


def test_nodes_that_are_not_known_are_asked_for(plan_of):
    assert rows(plan_of())["nodes"].startswith("not known: describe them in cluster.nodes")
    here = rows(plan_of(cluster={"address": None, "accelerator": "cpu"}))["nodes"]
    assert here.startswith("this machine (")
