"""Two runs on one cluster: each has engines and an endpoint of its own, and leaves none behind."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import potstill
from cluster.config import parse_config
from cluster.errors import BadInputError
from cluster.session import app_name, start_serve
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


@pytest.mark.parametrize("address", ["auto", None])
def test_a_run_that_fails_leaves_no_engine_on_a_joined_cluster(address, apps, monkeypatch):
    @contextmanager
    def nothing(*_):
        yield

    killed = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(potstill, "ray_session", nothing)
    monkeypatch.setattr(potstill, "watched_board", nothing)
    monkeypatch.setattr("pipeline.resampler.start_resampler", lambda *_: "resampler")
    monkeypatch.setattr("ray.kill", killed.append)
    apps.update(dict.fromkeys([pool(OURS), pool(OTHER)]))
    run = config("/runs/ours", cluster={"address": address})
    with pytest.raises(KeyboardInterrupt), potstill._data_plane(None, run):
        raise KeyboardInterrupt
    released = address is not None  # a cluster of our own ends with all that runs on it
    assert (killed, pool(OURS) in apps) == (["resampler"] if released else [], not released)
    assert pool(OTHER) in apps
