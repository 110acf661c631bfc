"""Runs as jobs, up to the door of the cluster: an HTTP server in the place of Ray's."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.errors import BadInputError, RunError
from cluster.jobs import parcel as parcels
from cluster.jobs import server as servers
from cluster.jobs.parcel import find_parcel, kept_back, refuse_large, size_of
from cluster.jobs.submit import plan_job, send_job

RECIPE = """
run: {folder: /shared/run, store: /shared/store}
task: {name: gsm8k}
teacher: {model: a}
student: {model: b}
"""
VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
PROJECT = Path(__file__).parents[1]


class JobServer:
    """Speaks as much of Ray's protocol as submitting a job takes, and keeps what it is sent."""

    def __init__(self, status: int, version: dict) -> None:
        ours, self.packages, self.requests, self.tokens = self, [], [], []
        self.jobs: list[dict] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                ours.tokens.append(self.headers.get("authorization"))
                known = {"/api/version": version, "/api/jobs/": ours.jobs}
                found = self.path in known
                self._answer(status if found else 404, known.get(self.path, {}))

            def do_PUT(self):
                ours.packages.append(self._body())
                self._answer(200, {})

            def do_POST(self):
                ours.requests.append(json.loads(self._body()))
                self._answer(200, {"job_id": "raysubmit_1", "submission_id": "raysubmit_1"})

            def _body(self):
                return self.rfile.read(int(self.headers["content-length"]))

            def _answer(self, code, body):
                payload = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def job_server():
    started = []

    def start(status=200, version=VERSION):
        started.append(JobServer(status, version))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No address, no token and no cache of the machine's user."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    # Set by the code under test: named here first, so that it is put back afterwards.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with things to ship and things to keep back."""
    root = tmp_path / "project"
    texts = {
        "potstill.py": "pass",
        "configs/mine.yaml": RECIPE,
        "cluster/models.py": "x",
        "docs/größe.md": "y",
        ".gitignore": "/out/\n*.log\n",
        "pipeline/.gitignore": "secret\n",
        "pipeline/secret": "no",
        "pipeline/open": "yes",
        "out/big": "no",
        "train.log": "no",
        "runs/a/config.yaml": "no",
        "store/key.parquet": "no",
        "models/model.safetensors": "no",
        ".venv/bin/python": "no",
        ".git/HEAD": "no",
        "evals/__pycache__/a.pyc": "no",
        ".mypy_cache/x": "no",
        "potstill.egg-info/PKG-INFO": "no",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "empty").mkdir()
    monkeypatch.chdir(root)
    return root


SHIPPED = {
    *("potstill.py", "configs/mine.yaml", "cluster/models.py", "docs/größe.md", "empty/"),
    *(".gitignore", "pipeline/.gitignore", "pipeline/open"),
}


def plan(folder, *overrides, recipe="configs/mine.yaml", arm=None):
    return plan_job(Path(recipe), list(overrides), arm, folder)


def test_what_ray_sends_is_what_was_counted(folder, job_server):
    job, server = plan(folder), job_server()
    assert send_job(servers.connect(server.url), job) == "raysubmit_1"
    (package,) = server.packages
    assert set(zipfile.ZipFile(BytesIO(package)).namelist()) == SHIPPED
    assert len(package) == job.size


def test_runs_of_the_recipe_stay_wherever_they_lie(folder):
    mine = folder / "mine [1]"
    for name in ("run/config.yaml", "data.jsonl"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("")
    job = plan(folder, f"run.folder={mine}/run", f"run.store={mine}/store")
    assert find_parcel(folder, job.excludes).keys() == SHIPPED | {"mine [1]/data.jsonl"}
    everything = find_parcel(folder, kept_back([], folder))
    assert "mine [1]/run/config.yaml" in everything


def test_git_ignored_files_go_along_where_ray_is_told_so(folder, job_server, monkeypatch):
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    job, server = plan(folder), job_server()
    send_job(servers.connect(server.url), job)
    names = set(zipfile.ZipFile(BytesIO(server.packages[0])).namelist())
    assert names == SHIPPED | {"out/big", "train.log", "pipeline/secret"}
    assert len(server.packages[0]) == job.size


def test_the_command_means_in_a_shell_what_was_typed(folder, job_server):
    awkward = "teacher.stop=['; rm -rf $HOME', \"it's\"]"
    server = job_server()
    job = plan(folder, awkward, "training.epochs=1", arm="mixed_policy_orpo")
    send_job(servers.connect(server.url), job)
    (request,) = server.requests
    typed = [awkward, "training.epochs=1", "--arm", "mixed_policy_orpo"]
    assert shlex.split(request["entrypoint"]) == [
        *("python", "potstill.py", "run", "configs/mine.yaml"),
        *typed,
    ]
    shown = subprocess.run(
        ["sh", "-c", request["entrypoint"].replace("python potstill.py run", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == ["configs/mine.yaml", *typed]
    assert request["entrypoint_num_cpus"] == 0
    assert request["metadata"] == {
        "potstill_run_folder": "/shared/run",
        "potstill_store": "/shared/store",
    }
    assert int(request["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["run.folder=runs/a"], ["run.folder=runs/a would be lost", "/project/runs/a"]),
        (["run.store=store"], ["run.store=store would be lost", "run.store=/"]),
        (["run.folder=./a", "run.store=b"], ["run.folder=./a and run.store=b would be lost"]),
    ],
)
def test_a_run_that_would_end_with_the_job_is_refused(folder, overrides, named):
    with pytest.raises(BadInputError) as refused:
        plan(folder, *overrides)
    assert all(words in str(refused.value) for words in named)


@pytest.mark.parametrize("place", ["s3://bucket/run", "/shared/run", "~/run"])
def test_a_run_that_outlives_the_job_is_taken(folder, place):
    assert plan(folder, f"run.folder={place}").metadata["potstill_run_folder"] == place


def test_the_folders_of_all_stages_are_known(folder):
    stages = "stages: {dsft: {training: {method: sft}}, orpo: {}}"
    (folder / "configs/two.yaml").write_text(f"{RECIPE}\n{stages}")
    job = plan(folder, recipe="configs/two.yaml")
    assert job.metadata["potstill_run_folder"] == "/shared/run/dsft, /shared/run/orpo"


@pytest.mark.parametrize("place", ["../outside.yaml", "out/ignored.yaml", "runs/kept.yaml"])
def test_a_recipe_that_the_job_would_not_have_is_refused(folder, place):
    (folder / place).write_text(RECIPE)
    with pytest.raises(BadInputError, match=r"would not have the recipe .*copy it to configs/"):
        plan(folder, recipe=place)


def test_a_recipe_may_be_named_by_its_whole_path(folder):
    assert " configs/mine.yaml" in plan(folder, recipe=str(folder / "configs/mine.yaml")).command


def test_a_folder_without_the_program_is_refused(folder):
    (folder / "potstill.py").unlink()
    with pytest.raises(BadInputError, match=r"has no potstill\.py"):
        plan(folder)


@pytest.mark.parametrize(
    ("override", "there"),
    [
        ("student.model=models", False),
        ("student.model=./models", False),
        ("task.data=out/big", False),
        ("task.data=pipeline/open", True),
        ("task.data=pipeline", True),
        ("student.model=HuggingFaceTB/SmolLM2-135M-Instruct", True),
    ],
)
def test_an_input_that_would_stay_behind_is_refused(folder, override, there):
    if there:
        assert plan(folder, override)
        return
    with pytest.raises(BadInputError, match=f"^{re.escape(override)} lies in .*take it along"):
        plan(folder, override)


def test_a_bad_recipe_is_refused_before_anything_else(folder):
    with pytest.raises(BadInputError, match="epochz"):
        plan(folder, "training.epochz=1", "run.folder=relative")


def test_a_folder_too_large_is_refused_by_its_largest_files(folder, job_server):
    """The limit counts the bytes of the package itself, the zip's own included."""
    job = plan(folder)
    (folder / "fits.bin").write_bytes(b"")
    room = parcels.LIMIT_BYTES - size_of(find_parcel(folder, job.excludes))
    os.truncate(folder / "fits.bin", room - 1)
    refuse_large(find_parcel(folder, job.excludes), folder)
    os.truncate(folder / "fits.bin", room)
    with pytest.raises(BadInputError, match=r"100\.0 MiB.*the largest: fits\.bin \(100\.0 MiB\), "):
        plan(folder)


def test_the_limit_is_that_of_rays_job_server():
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert parcels.LIMIT_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def test_what_cannot_be_read_is_a_clear_error(folder, monkeypatch):
    def fail(_):
        raise PermissionError(13, "Permission denied", "docs")

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(BadInputError, match=r"cannot be packed .*Permission denied.*\.gitignore"):
        plan(folder)


@pytest.mark.parametrize(
    ("given", "variables", "found"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://head:1"}, "http://head:1"),
        (None, {"RAY_ADDRESS": "auto", "RAY_API_SERVER_ADDRESS": "http://api:2"}, "http://api:2"),
        ("https://mine/", {"RAY_API_SERVER_ADDRESS": "http://api:2"}, "https://mine"),
    ],
)
def test_the_address_is_the_one_given_or_rays(given, variables, found, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert servers.resolve_address(given) == found


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379", "ray://head:10001"])
def test_an_address_for_drivers_is_no_address_for_jobs(address, monkeypatch):
    with pytest.raises(BadInputError, match=f"^--address={address} .*http://127"):
        servers.resolve_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BadInputError, match=f"^RAY_ADDRESS={address} .*http://127"):
        servers.resolve_address(None)


def test_a_given_address_wins_over_rays_variables(job_server, monkeypatch):
    ours, other = job_server(), job_server()
    monkeypatch.setenv("RAY_ADDRESS", other.url)
    assert servers.list_jobs(servers.connect(ours.url)) == []
    assert ours.tokens
    assert not other.tokens


@pytest.mark.parametrize("status", [401, 403])
def test_a_cluster_that_wants_a_token_says_where_to_put_it(job_server, status):
    url = job_server(status, {}).url
    with pytest.raises(BadInputError, match=rf"^the cluster at {url} wants its token .*auth_token"):
        servers.connect(url)


@pytest.mark.parametrize(("status", "version"), [(200, {"hello": "world"}), (404, {})])
def test_another_server_is_not_taken_for_ray(job_server, status, version):
    with pytest.raises(BadInputError, match="is no Ray dashboard"):
        servers.connect(job_server(status, version).url)


@pytest.mark.parametrize(
    ("variables", "file", "mode"),
    [
        ({}, False, None),
        ({}, True, "token"),
        ({"RAY_AUTH_TOKEN": "secret"}, False, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/token"}, False, "token"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "disabled"),
    ],
)
def test_a_token_of_this_machine_is_used(variables, file, mode, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file:
        token = Path.home() / ".ray" / "auth_token"
        token.parent.mkdir(parents=True)
        token.write_text("secret")
    servers.use_token()
    assert os.environ.get("RAY_AUTH_MODE") == mode


def test_no_cluster_is_one_clear_error(folder, free_port):
    url = f"http://127.0.0.1:{free_port()}"
    finished = subprocess.run(
        [sys.executable, PROJECT / "potstill.py", "submit", "configs/mine.yaml", "--address", url],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"error: no Ray cluster answers at {url} (ConnectionError")
    assert not finished.stdout


@pytest.fixture
def potstill(monkeypatch):
    """Calls the command line in this process; gives what it printed."""
    from typer.testing import CliRunner

    import potstill

    monkeypatch.setattr("cluster.jobs.commands.hush", lambda _: None)

    def call(*arguments):
        # Rich's console writes to the sys.stdout of the moment, which is the runner's.
        result = CliRunner().invoke(potstill.app, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return call


@pytest.mark.parametrize("name", ["logs", "status", "stop"])
def test_no_command_hangs_without_a_cluster(potstill, name, free_port):
    with pytest.raises(BadInputError, match=r"^no Ray cluster answers"):
        potstill(name, "raysubmit_1", "--address", f"http://127.0.0.1:{free_port()}")


def test_a_token_is_sent_though_no_mode_is_set(job_server, monkeypatch):
    """In a process of its own, since Ray reads the mode once."""
    server = job_server()
    code = "import sys; from cluster.jobs import server; server.connect(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, server.url],
        cwd=PROJECT,
        env={**os.environ, "RAY_AUTH_TOKEN": "x" * 32},
        check=True,
    )
    assert server.tokens[-1] == "Bearer " + "x" * 32


def test_an_address_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(servers, "_OPEN_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call, says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BadInputError, match=r"no Ray cluster answers .*Timeout"):
            servers.connect(url)


def details(**values):
    job = {
        "type": "SUBMISSION",
        "submission_id": "raysubmit_1",
        "status": "RUNNING",
        "entrypoint": "python potstill.py run a.yaml",
        "message": "fine",
        "start_time": 1_700_000_000_000,
        "metadata": {"potstill_run_folder": "s3://b/run", "potstill_store": "s3://b/store"},
    }
    return job | values


def test_status_tells_a_job_or_lists_all(potstill, job_server, monkeypatch):
    server = job_server()
    failed = details(
        submission_id="mine",
        status="FAILED",
        driver_exit_code=75,
        message="It ended\nlog",
        metadata={},
        start_time=1_600_000_000_000,
    )
    driver = details(type="DRIVER", submission_id=None)
    server.jobs = [details(), failed, driver]
    monkeypatch.setenv("RAY_ADDRESS", server.url)
    one = potstill("status", "raysubmit_1")
    assert "state: RUNNING\n" in one
    assert "ended: not yet\nrun: s3://b/run, store: s3://b/store\n" in one
    named = potstill("status", "mine", "--address", server.url)
    assert "state: FAILED, exit code 75\n" in named
    assert named.endswith("Ray says: It ended\n")
    rows = [row.split("  ") for row in potstill("status").splitlines()]
    assert [row[:2] for row in rows] == [["mine", "FAILED"], ["raysubmit_1", "RUNNING"]]
    assert [row[3] for row in rows] == [failed["entrypoint"], "s3://b/run"]
    with pytest.raises(BadInputError, match=r"has no job raysubmit_2: `potstill status --address"):
        potstill("status", "raysubmit_2")


def test_status_of_a_cluster_without_jobs(potstill, job_server):
    url = job_server().url
    assert potstill("status", "--address", url) == f"no jobs yet at {url}\n"


def test_status_of_a_run_asks_no_cluster(potstill, folder, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(BadInputError, match="no run in"):
        potstill("status", "runs/none")


def test_a_job_that_has_ended_is_not_stopped_again(potstill, job_server):
    server = job_server()
    server.jobs = [details(status="SUCCEEDED", driver_exit_code=0)]
    assert "state: SUCCEEDED, exit code 0\n" in potstill(
        "stop", "raysubmit_1", "--address", server.url
    )
    assert not server.requests


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 75),
        ("FAILED", 75, 75),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", 137, 1),
        ("FAILED", None, 1),
    ],
)
def test_a_command_that_waits_ends_as_the_run_did(status, code, expected):
    ended = SimpleNamespace(status=status, driver_exit_code=code)
    assert servers.exit_code_of(ended) == expected


def test_a_job_that_does_not_end_is_given_up(monkeypatch):
    running = SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: False))
    monkeypatch.setattr(servers, "find_job", lambda *_: running)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(RunError, match="raysubmit_1 is still"):
        servers.wait_until_ended(None, "raysubmit_1", timeout_s=0)
