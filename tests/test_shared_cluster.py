"""Two runs on one cluster: each has engines and an endpoint of its own, and leaves none behind."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from cluster.config import parse_config
from cluster.errors import BadInputError
from cluster.session import app_name, pool_name, start_serve
from evals import runs
from pipeline.pool import release_engines, running_apps
from serving.app import _place, stop_serving


def config(folder, **sections):
    raw = {
        "run": {"folder": folder},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
    }
    return parse_config(raw | sections, "test")


OURS, OTHER = config("/runs/ours"), config("/runs/other")


def pool(run, weights="1234-bfloat16"):
    return f"{app_name(run, 'sampler')}-{weights}"


@pytest.fixture
def apps(monkeypatch):
    """What Ray Serve runs."""
    running = {}
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=running))
    monkeypatch.setattr("ray.serve.delete", running.pop)
    return running


def test_a_run_is_known_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app_name(config("run"), "sampler") == app_name(config(str(tmp_path / "run")), "sampler")
    assert app_name(OURS, "sampler") != app_name(OTHER, "sampler")


def test_engines_of_another_run_stay(apps):
    apps.update(dict.fromkeys([pool(OURS), pool(OTHER)]))
    assert running_apps(OURS) == [pool(OURS)]
    release_engines(OURS)
    assert [*apps] == [pool(OTHER)]


def test_endpoints_of_two_runs_stand_side_by_side(apps):
    apps[pool(OTHER)] = None
    name, path = _place(OURS)
    assert path == "/"
    apps[name] = None
    assert _place(OURS) == (name, "/"), "the endpoint of this run is replaced"
    other, path = _place(OTHER)
    assert (other != name, path) == (True, f"/{other}")
    apps[other] = None
    stop_serving(OURS)
    assert [*apps] == [pool(OTHER), other]


def test_another_port_than_that_of_a_running_serve_is_refused(monkeypatch):
    running = SimpleNamespace(http_config=SimpleNamespace(host="127.0.0.1", port=8000))
    monkeypatch.setattr("ray.serve.start", lambda **_: None)
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: running)
    start_serve(OURS)
    with pytest.raises(BadInputError, match=r"'port': 8000}, expected .*'port': 9000}: set"):
        start_serve(config("/runs/ours", serving={"port": 9000}))


@pytest.mark.parametrize("all_ends", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_fails_leaves_no_engine_on_a_joined_cluster(all_ends, kept, apps, monkeypatch):
    @contextmanager
    def session(*_):
        yield all_ends

    killed = []
    monkeypatch.setattr(runs, "ray_session", session)
    monkeypatch.setattr(runs, "watched_board", session)
    monkeypatch.setattr(runs, "settled", lambda config: config)
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr("pipeline.resampler.start_resampler", lambda *_: "resampler")
    monkeypatch.setattr("ray.kill", killed.append)
    apps.update(dict.fromkeys([pool(OURS), pool(OTHER)]))
    with pytest.raises(KeyboardInterrupt), runs._data_plane(None, OURS, kept):
        raise KeyboardInterrupt
    assert killed == ([] if all_ends else ["resampler"])
    stays = all_ends or kept  # with the cluster, or for who shares it
    assert (pool(OURS) in apps) == stays
    assert pool(OTHER) in apps


def test_runs_that_name_a_pool_share_its_engines():
    one, other = (config(f"/runs/{n}", engines={"pool": "table"}) for n in (1, 2))
    longer = config("/runs/3", engines={"pool": "table-2"})
    assert not pool_name(longer).startswith(pool_name(one))
    assert pool_name(one) == pool_name(other) != pool_name(OURS) != pool_name(OTHER)
