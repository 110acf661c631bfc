"""The pool's sizes reach Ray Serve and vLLM; real pools are in integration/."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from cluster.sections import Engines
from pipeline import pool
from pipeline.engine import SamplingEngine, Weights, shared_out, start_engine
from pipeline.pool import _deployment

WEIGHTS = Weights("org/model", "d1", "a1", "bfloat16")


@pytest.fixture
def deployed(config_of):
    """The deployment of a run with these engines."""

    def deploy(on_gpu=True, **engines):
        return _deployment(config_of(engines=engines), on_gpu, WEIGHTS)

    return deploy


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What vLLM is asked for by an engine; vLLM itself is not imported."""
    arguments, engine = ModuleType("vllm.engine.arg_utils"), ModuleType("vllm.v1.engine.async_llm")
    usage = ModuleType("vllm.usage.usage_lib")
    arguments.AsyncEngineArgs = SimpleNamespace
    usage.UsageContext = SimpleNamespace(LLM_CLASS="offline")

    def from_engine_args(asked, usage_context):
        assert usage_context == "offline", "else vLLM samples 128 sequences at once, and no more"
        return asked

    engine.AsyncLLM = SimpleNamespace(from_engine_args=from_engine_args)
    for name in ("vllm", "vllm.engine", "vllm.usage", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (arguments, engine, usage):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")  # set by the code: put back afterwards
    return lambda on_gpu, **options: start_engine(tmp_path, WEIGHTS, Engines(**options), on_gpu)


def test_the_pool_grows_between_its_two_sizes(deployed):
    scaling = deployed(min_engines=2, max_engines=5)._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)


def test_what_is_sent_at_once_decides_when_it_grows(deployed):
    options = deployed(batches_in_flight=3)
    assert options._deployment_config.autoscaling_config.target_ongoing_requests == 3
    assert options.max_ongoing_requests == 6


@pytest.mark.parametrize("most", [None, 2])
def test_a_node_takes_no_more_engines_than_it_may(deployed, most):
    options = deployed(engines_per_node=most, max_engines=4)
    assert options._replica_config.max_replicas_per_node == most


def test_an_engine_holds_what_each_of_its_processes_takes(deployed):
    engines = {"tensor_parallel": 2, "cpus_per_engine": 3}
    assert deployed(**engines).ray_actor_options == {"num_cpus": 6, "num_gpus": 2}
    assert deployed(on_gpu=False, **engines).ray_actor_options == {"num_cpus": 6}


def test_an_engine_is_handed_its_section_and_its_model(config_of, monkeypatch):
    config = config_of(engines={"tensor_parallel": 2})
    monkeypatch.setattr(pool, "start_serve", lambda config: None)
    monkeypatch.setattr(pool, "running_apps", lambda config: [])
    monkeypatch.setattr(pool, "_run_app", lambda app, *_: app._bound_deployment)
    bound = pool.ensure_engines(config, WEIGHTS, on_gpu=False)
    assert bound.func_or_class is SamplingEngine
    assert bound.init_args == (config.engines, False)
    assert Weights(**bound.user_config) == WEIGHTS


def test_another_size_is_another_version_and_other_weights_are_not(config_of):
    def version(weights=WEIGHTS, **engines):
        return _deployment(config_of(engines=engines), True, weights).version

    assert version() == version(Weights("org/model", "d2", "a1", "bfloat16"))
    assert version() != version(tensor_parallel=2)
    assert version() != version(max_engines=2)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_an_engine_splits_its_model_over_its_processes(started, on_gpu):
    assert started(on_gpu).tensor_parallel_size == 1
    asked = started(on_gpu, tensor_parallel=2, max_model_len=384)
    assert (asked.tensor_parallel_size, asked.max_model_len) == (2, 384)


def test_processes_on_a_cpu_share_its_cache(started):
    whole, halves = (started(False, tensor_parallel=n, kv_cache_gib=2) for n in (1, 2))
    assert whole.kv_cache_memory_bytes == 2 * halves.kv_cache_memory_bytes == 2 << 30


@pytest.mark.parametrize(
    ("cores", "processes", "shares"),
    [(2, 1, "0-1"), (8, 2, "0-3|4-7"), (5, 2, "0-1|2-4"), (1, 2, "0-0|0-0")],
)
def test_processes_on_a_cpu_share_its_cores(cores, processes, shares):
    assert shared_out(cores, processes) == shares
