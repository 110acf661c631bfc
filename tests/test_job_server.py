"""The job server of a cluster: where it is, who may ask it, what it says of jobs."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import potstill as command_line
from cluster.errors import BadInputError, RunError
from cluster.jobs import commands
from cluster.jobs import server as servers

pytestmark = pytest.mark.usefixtures("no_ray_settings")

PROJECT = Path(__file__).parents[1]
_SUBMIT = [
    *("submit", "configs/quickstart_small.yaml"),
    *("run.folder=s3://bucket/run", "run.store=s3://bucket/store"),
]


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


def test_no_cluster_is_one_clear_error(free_port):
    """In a process of its own: what Ray prints must not reach the user."""
    url = f"http://127.0.0.1:{free_port()}"
    finished = subprocess.run(
        [sys.executable, "potstill.py", *_SUBMIT, "--address", url],
        cwd=PROJECT,
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

    monkeypatch.setattr("cluster.jobs.commands.hush", lambda _: None)

    def call(*arguments):
        # Rich's console writes to the sys.stdout of the moment, which is the runner's.
        result = CliRunner().invoke(command_line.app, arguments)
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


def test_status_of_a_run_asks_no_cluster(potstill, monkeypatch):
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


def client_whose_log_ends_in(error):
    async def tail(_):
        yield "epoch 1 [bold]\n"
        raise error

    return SimpleNamespace(tail_job_logs=tail, get_address=lambda: "http://head:8265")


def test_ctrl_c_ends_only_the_watching(capsys):
    with pytest.raises(typer.Exit) as left:
        commands._follow(client_whose_log_ends_in(KeyboardInterrupt), "raysubmit_1")
    assert left.value.exit_code == 75
    again = "potstill logs raysubmit_1 --address http://head:8265 --follow"
    said = f"raysubmit_1 goes on without this command: {again}"
    assert capsys.readouterr().out == f"epoch 1 [bold]\n{said}\n"


@pytest.mark.parametrize("error", [OSError("reset"), RuntimeError("closed with code 1006")])
def test_a_log_that_breaks_off_says_nothing_of_the_job(error):
    with pytest.raises(RunError, match=rf"broke off \({error}\); the job may well go on"):
        commands._follow(client_whose_log_ends_in(error), "raysubmit_1")


@pytest.mark.parametrize(("code", "told"), [(75, False), (1, True)])
def test_no_command_that_was_told_of_is_told_again(code, told, monkeypatch, capsys):
    """Submitted again, an interrupted `submit --wait` would not go on, but run twice."""

    def leave():
        raise SystemExit(code)

    monkeypatch.setattr(command_line, "_count_interruptions", lambda: [2])
    monkeypatch.setattr(command_line, "app", leave)
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == 75
    assert ("the same command goes on" in capsys.readouterr().err) == told
