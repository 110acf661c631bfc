"""ray_cluster.yaml against Ray's own checks and what each cloud's API takes; starts nothing."""

import copy
import json
import re
from importlib import metadata
from pathlib import Path

import boto3
import jsonschema
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

PROJECT = Path(__file__).parents[1]
REPLACED_WHOLE = {"provider", "node_config"}  # as docs/cluster.md says; and every list


@pytest.fixture
def cluster():
    return yaml.safe_load((PROJECT / "ray_cluster.yaml").read_text())


def problems_of(node_config):
    """What botocore would refuse before a request leaves the machine."""
    client = boto3.client("ec2", region_name="us-west-2")
    request = client.meta.service_model.operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, request)
    return report.generate_report()


def lines_for(cloud):
    """The lines that docs/cluster.md gives under "On <cloud>"."""
    guide = (PROJECT / "docs/cluster.md").read_text()
    section = re.search(
        rf"^## On {cloud}\n(.*?)(?=^## )", guide + "\n## ", re.DOTALL | re.MULTILINE
    )
    (block,) = re.findall(r"```yaml\n(.*?)```", section.group(1), re.DOTALL)
    return yaml.safe_load(block)


def merged(cluster, changes):
    result = dict(cluster)
    for key, value in changes.items():
        deeper = isinstance(value, dict) and key in result and key not in REPLACED_WHOLE
        result[key] = merged(result[key], value) if deeper else value
    return result


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
    assert nodes["training"]["min_workers"] == nodes["sampling"]["min_workers"] == 0
    assert nodes["sampling"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["max_workers"] == sum(node["max_workers"] for node in nodes.values())


def test_its_nodes_have_the_ray_of_the_locks_and_install_the_gpu_lock(cluster):
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert re.match(
            rf"rayproject/ray:{re.escape(metadata.version('ray'))}-py311(-gpu)?$", image
        )
    assert f"ray=={metadata.version('ray')}" in (PROJECT / "requirements/gpu.txt").read_text()
    assert "sh ~/potstill/requirements/install.sh gpu" in cluster["setup_commands"]


def test_its_labels_are_those_that_a_run_is_told_to_go_by(cluster):
    guide = (PROJECT / "docs/cluster.md").read_text()
    for stage in ("training", "sampling"):
        assert cluster["available_node_types"][stage]["labels"] == {"stage": stage}
        assert f"cluster.{stage}_nodes=stage={stage}" in guide


@pytest.mark.parametrize("cloud", ["GCP", "Azure"])
def test_ray_accepts_it_with_the_lines_of_another_cloud(cluster, cloud):
    changed = merged(cluster, lines_for(cloud))
    validate_config(prepare_config(changed))
    assert changed["provider"]["type"] == cloud.lower()
    assert "InstanceType" not in str(changed)
    assert "ami-" not in str(changed)
    assert "--env RAY_AUTH_MODE=token" in changed["docker"]["run_options"]
    for name, node in changed["available_node_types"].items():
        assert node["resources"]["CPU"] > 0, "Ray finds them out on AWS only"
        assert ("GPU" in node["resources"]) == (name != "head")
        assert name == "head" or node["labels"] == {"stage": name}


def test_the_lines_for_gcp_have_spot_machines_for_samplers_alone():
    nodes = lines_for("GCP")["available_node_types"]
    for name, model in (("training", None), ("sampling", "SPOT")):
        scheduling = nodes[name]["node_config"]["scheduling"]
        assert scheduling.get("provisioningModel") == model
        assert scheduling["onHostMaintenance"] == "TERMINATE", "GPUs cannot be moved while in use"


def test_the_lines_for_azure_are_parameters_of_rays_template():
    template = Path(ray.__file__).parent / "autoscaler/_private/_azure/azure-vm-template.json"
    known = json.loads(template.read_text())["parameters"]
    for name, node in lines_for("Azure")["available_node_types"].items():
        parameters = node["node_config"]["azure_arm_parameters"]
        assert parameters.keys() <= known.keys(), name
        assert parameters.get("priority") == ("Spot" if name == "sampling" else None)


def test_only_the_head_may_start_machines_and_no_credentials_leak_by_a_forged_request(cluster):
    configs = {name: node["node_config"] for name, node in cluster["available_node_types"].items()}
    roles = {name: config["IamInstanceProfile"]["Name"] for name, config in configs.items()}
    assert roles["head"] not in (roles["training"], roles["sampling"])
    for config in configs.values():
        assert config["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"])


def test_it_is_closed_to_strangers(cluster):
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
