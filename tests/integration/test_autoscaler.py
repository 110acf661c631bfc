"""What grows: a pool of engines by Ray Serve, a cluster by Ray's autoscaler, its machines raylets
here."""

import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.config import parse_config
from cluster.session import ray_session
from cluster.storage import location
from pipeline.pool import release_engines
from pipeline.sampling import make_writer, sample
from pipeline.store import SampleStore
from pipeline.tasks import load_prompts
from tests.integration.runs import end, go, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1200)]

HEAD = f"{0:056x}".replace("0", "f", 51)
HEAD_TYPE = "ray.head.default"  # as the provider calls it
IDLE_S, START_LIMIT_S = 12, 90
# The provider's own defaults lack a file in Ray's package; as an external one it needs none.
PROVIDER = {
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "head_node_id": HEAD,
    "launch_multiple": True,
}


LISTS = """initialization_commands setup_commands head_setup_commands worker_setup_commands
    head_start_ray_commands worker_start_ray_commands
    cluster_synced_files rsync_exclude rsync_filter"""
# What the provider's defaults would fill in.
FILLED_IN = {
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
} | {name: [] for name in LISTS.split()}


def cluster_config(address: str) -> dict:
    """As ray_cluster.yaml: a head, and nodes for training and for sampling from none up."""
    nodes = {
        stage: {
            "resources": {"CPU": 4},
            "labels": {"stage": stage},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
        }
        for stage in ("training", "sampling")
    }
    head = {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0}
    return {
        **FILLED_IN,
        "cluster_name": "here",
        "provider": PROVIDER | {"gcs_address": address},
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 10,
        "head_node_type": HEAD_TYPE,
        "available_node_types": nodes | {HEAD_TYPE: head},
    }


@pytest.fixture
def address(free_port, tmp_path, monkeypatch):
    """A cluster that is no more than its head, until more is asked for."""
    from ray._private.services import get_node_ip_address

    ip, port = get_node_ip_address(), free_port()
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster_config(f"{ip}:{port}")))
    for name, value in {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }.items():
        monkeypatch.setenv(name, value)
    flags = {
        "port": port,
        "node-ip-address": ip,
        "num-cpus": 2,
        "autoscaling-config": tmp_path / "cluster.yaml",
        "dashboard-agent-listen-port": free_port(),
        "include-dashboard": "false",
    }
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        started = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("ray"), "start", "--head", "--block"),
                *(f"--{name}={value}" for name, value in flags.items()),
                f"--temp-dir={folder}",
            ],
            stdout=(tmp_path / "head.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for name in ("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID"):
            monkeypatch.delenv(name)  # they are the head's alone
        try:
            yield f"{ip}:{port}"
        finally:
            end(started)


@pytest.fixture
def seen(address):
    """The kinds of nodes that were up at once, one after the other, as they change."""
    import ray

    deadline = time.monotonic() + START_LIMIT_S
    while not ray.is_initialized():
        try:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        except ConnectionError:
            assert time.monotonic() < deadline
    states, ended = [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            nodes = [node["Labels"] for node in ray.nodes() if node["Alive"]]
            state = tuple(sorted(labels.get("stage", "head") for labels in nodes))
            if state not in states[-1:]:
                states.append(state)

    watching = threading.Thread(target=watch)
    watching.start()
    yield states
    ended.set()
    watching.join()
    ray.shutdown()


def test_nodes_come_for_a_stage_and_go_after_it(address, seen, guesser, free_port, tmp_path):
    recipe = write_recipe(tmp_path / "home", guesser, free_port())
    options = [
        f"cluster.address={address}",
        "cluster.accelerator=cpu",
        "cluster.training_nodes=stage=training",
        "cluster.sampling_nodes=stage=sampling",
        "engines.between_epochs=release",
        "training.steps_per_epoch=2500",
        "evaluation.through=engines",
    ]
    ended = go(recipe, options)
    print(ended.screen, *seen, sep="\n")
    assert ended.code == 0, ended.screen
    deadline = time.monotonic() + 10 * IDLE_S
    while seen[-1] != ("head",):
        assert time.monotonic() < deadline, seen
        time.sleep(0.5)
    print(*seen, sep="\n")
    assert seen[0] == ("head",)
    alone = seen.index(("head", "training"))
    assert ("head", "sampling") in seen[:alone], "first the engines' node"
    both = ("head", "sampling", "training")
    assert both in seen[alone:], "it came back for the student after epoch 1"


class Engines:
    """Watches the processes of vLLM's engines while a block runs."""

    def __init__(self) -> None:
        self.busy_s: dict[int, float] = {}  # CPU time of each, by its process
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "EngineCore" in process.name() + " ".join(process.cmdline()):
                        self.busy_s[process.pid] = process.cpu_times().user

    def __enter__(self) -> "Engines":
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watching.join()


def test_a_second_engine_comes_while_there_is_work(tiny_llama, tmp_path):
    """The samples are those of one engine, whichever of the two has drawn them."""
    recipe = {
        "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        "task": {"name": "word_problems", "train_prompts": 60},
        "teacher": {"model": str(tiny_llama)},
        "student": {"model": str(tiny_llama), "dtype": "float32"},
        "sampling": {"samples": 40, "max_new_tokens": 200},
        "engines": {
            "max_model_len": 512,
            "kv_cache_gib": 0.2,
            "enforce_eager": True,
            "batch_rows": 4,
        },
    }
    drawn = {}
    for most in (1, 2):
        recipe["engines"]["max_engines"] = most
        config = parse_config(recipe, "test")
        prompts = load_prompts(config.task, "train", 0)
        student = make_writer("student", str(tiny_llama), config.student, config, "number")
        store = SampleStore(location(str(tmp_path / f"store_{most}")))
        with ray_session(config), Engines() as engines:
            rows = sample(student, prompts, config, store, on_gpu=False)
            release_engines(config)
        print(most, engines.busy_s)
        assert len(engines.busy_s) == most
        drawn[most] = {row.key: row.text for row in rows}
        assert len(drawn[most]) == len(rows) == 60 * 40
    assert drawn[1] == drawn[2]
