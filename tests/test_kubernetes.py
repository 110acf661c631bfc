"""The manifests for KubeRay, by those who read them: Ray's autoscaler, Ray Serve, KubeRay's schema.

KubeRay's schema is not part of this repository. To check against it, give its folder:

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay /tmp/kuberay
    KUBERAY_CRDS=/tmp/kuberay/helm-chart/kuberay-operator/crds pytest tests/test_kubernetes.py
"""

import copy
import os
from importlib import metadata, util
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.serve.schema import ServeDeploySchema

from cluster.recipes import load_recipe
from serving.deployment import Deployed

PROJECT = Path(__file__).parents[1]
FOLDER = PROJECT / "cluster/kubernetes"
CRDS = os.environ.get("KUBERAY_CRDS")
CLUSTER_OF = {"rayjob": "rayClusterSpec", "rayservice": "rayClusterConfig"}


def manifest(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def cluster_of(name):
    return manifest(name)["spec"][CLUSTER_OF[name]]


def groups_of(cluster):
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def pods_of(cluster):
    return [group["template"]["spec"] for group in all_groups(cluster)]


def all_groups(cluster):
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def strict(schema):
    """A schema of Kubernetes as JSON Schema, which also refuses fields that it does not name."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    fields = isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema
    if fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


def published_schema(name):
    text = (Path(str(CRDS)) / f"ray.io_{name}s.yaml").read_text()
    versions = yaml.CSafeLoader(text).get_single_data()["spec"]  # the other takes a minute
    (wanted,) = (one for one in versions["versions"] if one["name"] == "v1")
    schema = strict(wanted["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return schema


@pytest.mark.skipif(not CRDS, reason="KUBERAY_CRDS names no folder: see the top of this file")
@pytest.mark.parametrize("name", CLUSTER_OF)
def test_kuberay_s_published_schema_takes_it_and_no_unknown_field(name):
    validator = jsonschema.Draft202012Validator(published_schema(name))
    given = manifest(name)
    validator.validate(given)
    for place, key in [
        (lambda it: it["spec"], "shutdownAfterJobFinish"),
        (lambda it: it["spec"][CLUSTER_OF[name]], "enableInTreeAutoscalling"),
        (lambda it: pods_of(it["spec"][CLUSTER_OF[name]])[1]["containers"][0], "resourses"),
    ]:
        wrong = copy.deepcopy(given)
        place(wrong)[key] = True
        with pytest.raises(jsonschema.ValidationError, match=key):
            validator.validate(wrong)


def test_a_field_that_a_schema_does_not_name_is_refused_unless_it_lets_any_pass():
    named = {"type": "object", "properties": {"a": {"type": "string"}}}
    jsonschema.validate({"a": "x"}, strict(named))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"a": "x", "b": 1}, strict(named))
    jsonschema.validate({"b": 1}, strict(named | {"x-kubernetes-preserve-unknown-fields": True}))
    labels = {"type": "object", "additionalProperties": {"type": "string"}}
    jsonschema.validate({"stage": "training"}, strict(labels))


@pytest.mark.parametrize("name", CLUSTER_OF)
def test_ray_s_autoscaler_reads_its_groups(name):
    given = {"metadata": {"name": name, "namespace": "potstill"}, "spec": cluster_of(name)}
    assert given["spec"]["enableInTreeAutoscaling"] is True
    config = _derive_autoscaling_config_from_ray_cr(given)
    nodes = config["available_node_types"]
    assert config["idle_timeout_minutes"] == 10
    assert nodes["headgroup"]["resources"].get("GPU", 0) == 0
    for group in set(nodes) - {"headgroup"}:
        assert nodes[group]["min_workers"] == 0 < nodes[group]["max_workers"]
        assert nodes[group]["resources"]["GPU"] > 0


def test_trainers_stay_and_samplers_are_on_spot_machines_by_the_labels_that_the_run_goes_by():
    groups = groups_of(cluster_of("rayjob"))
    assert set(groups) == {"training", "sampling"}
    places = {name: group["template"]["spec"]["nodeSelector"] for name, group in groups.items()}
    assert [*places["training"].values()] == ["ON_DEMAND"]
    assert [*places["sampling"].values()] == ["SPOT"]
    (config,) = recipe_of_the_job()
    for name, group in groups.items():
        assert group["labels"] == {"stage": name}
        assert getattr(config.cluster, f"{name}_nodes") == f"stage={name}"


def recipe_of_the_job():
    python, program, command, recipe, *overrides = manifest("rayjob")["spec"]["entrypoint"].split()
    assert (python, program, command) == ("python", "potstill.py", "run")
    return load_recipe(PROJECT / recipe, overrides)


def test_the_job_runs_a_shipped_recipe_that_keeps_its_files_in_a_bucket_and_then_goes():
    (config,) = recipe_of_the_job()
    assert config.cluster.accelerator == "gpu"
    assert config.run.folder.startswith("s3://")
    assert config.run.store.startswith("s3://")
    assert manifest("rayjob")["spec"]["shutdownAfterJobFinishes"] is True


def test_the_service_is_what_ray_serve_and_the_builder_take():
    config = ServeDeploySchema.model_validate(
        yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    )
    (app,) = config.applications
    module, _, function = app.import_path.partition(":")
    assert util.find_spec(module) is not None
    assert (module, function) == ("serving.deployment", "build")
    assert Deployed.model_validate(app.args).run.startswith("s3://")
    ports = {port["name"]: port["containerPort"] for port in head_container("rayservice")["ports"]}
    assert config.http_options.port == ports["serve"]


def head_container(name):
    return cluster_of(name)["headGroupSpec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("name", CLUSTER_OF)
def test_it_runs_the_ray_of_the_locks_in_one_image_of_ours(name):
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == metadata.version("ray")
    images = {pod["containers"][0]["image"] for pod in pods_of(cluster)}
    assert len(images) == 1
    assert f"FROM base AS {images.pop().rpartition(':')[2]}" in (PROJECT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", CLUSTER_OF)
def test_it_demands_the_token_of_a_secret_and_holds_none(name):
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "potstill-ray-token"}
    assert "kubectl create secret generic potstill-ray-token" in guide()
    given = [variable for pod in pods_of(cluster) for variable in environment_of(pod)]
    secret = [one for one in given if "TOKEN" in one["name"] or "KEY" in one["name"]]
    assert not [one for one in secret if "secretKeyRef" not in one.get("valueFrom", {})]
    for one in secret:
        assert f"create secret generic {one['valueFrom']['secretKeyRef']['name']}" in guide()


def environment_of(pod):
    return pod["containers"][0]["env"]


def guide():
    return (PROJECT / "docs/cluster.md").read_text()


@pytest.mark.parametrize("name", CLUSTER_OF)
def test_its_pods_are_confined(name):
    cluster = cluster_of(name)
    confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert cluster["autoscalerOptions"]["securityContext"] == confined
    for pod in pods_of(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        (container,) = pod["containers"]
        assert container["securityContext"] == confined
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {**limits, **requests} == limits, "what is asked for is also the limit"
        assert {"cpu", "memory", "ephemeral-storage"} <= requests.keys()
    workers = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
    assert not any(pod["automountServiceAccountToken"] for pod in workers)


def test_the_network_lets_only_ray_kuberay_and_clients_in():
    policy = manifest("network")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    ports = {
        str(rule["from"]): [one["port"] for one in rule.get("ports", [])]
        for rule in policy["ingress"]
    }
    everywhere = [source for source, there in ports.items() if not there]
    assert len(everywhere) == 1
    assert "is-ray-node" in everywhere[0]
    assert sorted(map(tuple, ports.values())) == [(), (8000,), (8265,), (8265, 8000)]
    for source, there in ports.items():
        assert ("client" in source) == (there == [8000])
