"""ray_cluster.yaml against Ray's own checks and against what EC2's API takes; starts nothing."""

import copy
import re
from importlib import metadata
from pathlib import Path

import boto3
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def cluster():
    return yaml.safe_load((PROJECT / "ray_cluster.yaml").read_text())


def problems_of(node_config):
    """What botocore would refuse before a request leaves the machine."""
    client = boto3.client("ec2", region_name="us-west-2")
    request = client.meta.service_model.operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, request)
    return report.generate_report()


def test_ray_accepts_it(cluster):
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_wokers": 3}, jsonschema.ValidationError),
        ({"head_node_type": "haed"}, ValueError),
        ({"idle_timeout_minutes": "ten"}, jsonschema.ValidationError),
    ],
)
def test_rays_check_would_see_a_mistake(cluster, change, error):
    with pytest.raises(error):
        validate_config(prepare_config(cluster | change))


def test_ec2_knows_every_option_of_every_node(cluster):
    for name, node in cluster["available_node_types"].items():
        assert problems_of(node["node_config"]) == "", name
    wrong = copy.deepcopy(cluster["available_node_types"]["sampling"]["node_config"])
    wrong["InstanceMarketOption"] = {}
    assert "InstanceMarketOption" in problems_of(wrong)


def test_its_groups_are_a_cpu_head_a_trainer_and_spot_samplers_from_none(cluster):
    nodes = cluster["available_node_types"]
    assert set(nodes) == {"head", "training", "sampling"}
    assert cluster["head_node_type"] == "head"
    assert nodes["head"]["node_config"]["InstanceType"].startswith("m")
    assert "InstanceMarketOptions" not in nodes["training"]["node_config"]
    assert nodes["sampling"]["min_workers"] == 0
    assert nodes["sampling"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["max_workers"] == sum(node["max_workers"] for node in nodes.values())


def test_its_nodes_have_the_ray_of_the_locks_and_install_the_gpu_lock(cluster):
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert re.match(
            rf"rayproject/ray:{re.escape(metadata.version('ray'))}-py311(-gpu)?$", image
        )
    assert f"ray=={metadata.version('ray')}" in (PROJECT / "requirements/gpu.txt").read_text()
    assert "sh ~/potstill/requirements/install.sh gpu" in cluster["setup_commands"]


def test_it_is_closed_to_strangers(cluster):
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
