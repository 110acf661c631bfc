"""What several files share: a Ray, a run to compare with, times that are shown at the end."""

from collections.abc import Callable

import pytest

TIMES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def measured(pytestconfig) -> Callable[[str], None]:
    """Takes a line on how long it took to recover; docs/faults.md has such times."""
    return pytestconfig.stash.setdefault(TIMES, []).append


def pytest_terminal_summary(terminalreporter, config):
    if times := config.stash.get(TIMES, None):
        terminalreporter.section("times measured")
        for line in times:
            terminalreporter.write_line(line)


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
