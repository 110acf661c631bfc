"""What several files of training tests start from."""

import pytest


@pytest.fixture(scope="module")
def ray_cluster():
    import ray

    from cluster.session import NO_DASHBOARD

    ray.init(
        address="local",  # and not a cluster that happens to run here
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"RAY_TRAIN_V2_ENABLED": "1"} | NO_DASHBOARD},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(ray_cluster, tmp_path_factory, tiny_llama):
    """One worker, whole batches, float32: what the other layouts are held against."""
    from tests.integration.trainings import train_run

    return train_run(tmp_path_factory.mktemp("reference"), tiny_llama)
