"""Recipes as jobs of a real Ray cluster on this machine, which asks for its token."""

import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from cluster.recipes import load_config
from cluster.run_folder import RunFolder, open_run
from cluster.storage import location
from tests.integration.runs import Recovery, end, family_of, go, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PROJECT = Path(__file__).parents[2]
START_LIMIT_S, JOB_LIMIT_S = 90, 180


@dataclass(frozen=True)
class Head:
    """A cluster of one node, and what a shell needs to talk to it."""

    url: str
    environment: dict[str, str]
    options: list[str]
    """Which make the recipe one of tiny models."""
    pid: int
    address: str
    """For who joins the cluster and sends no job."""

    @property
    def at(self) -> list[str]:
        return ["--address", self.url]

    def potstill(
        self, *arguments: str, limit_s: float = JOB_LIMIT_S, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "potstill.py", *arguments],
            cwd=PROJECT,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
        )

    def submit(
        self, run: Path, *arguments: str, limit_s: float = JOB_LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        recipe = "configs/quickstart_small.yaml"
        places = [f"run.folder={run}/run", f"run.store={run}/store"]
        rest = [*self.options, *arguments, *self.at]
        return self.potstill("submit", recipe, *places, *rest, limit_s=limit_s)

    def submit_by_ray(self, run: Path) -> str:
        """Send the same recipe without Potstill's own command; gives the job."""
        command = [str(Path(sys.executable).with_name("ray")), "job", "submit", *self.at]
        command += ["--no-wait", "--working-dir", ".", "--", "python", "potstill.py", "run"]
        command += ["configs/quickstart_small.yaml", f"run.folder={run}/run"]
        sent = subprocess.run(
            [*command, f"run.store={run}/store", *self.options],
            cwd=PROJECT,
            env=self.environment | {"RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=JOB_LIMIT_S,
        )
        assert sent.returncode == 0, sent.stdout + sent.stderr
        return re.search(r"raysubmit_\w+", sent.stdout)[0]

    def log_once_it_has(self, job: str, words: str) -> str:
        deadline = time.monotonic() + JOB_LIMIT_S
        while words not in (log := self.potstill("logs", job, *self.at).stdout):
            assert time.monotonic() < deadline, log
            time.sleep(1)
        return log


@pytest.fixture(scope="module")
def head(tiny_llama, free_port, tmp_path_factory):
    """A cluster whose recipes are of tiny models."""
    with a_head(tmp_path_factory.mktemp("home"), free_port, tiny(tiny_llama, free_port())) as found:
        yield found


@contextmanager
def a_head(home: Path, free_port, options: list[str]):
    """`ray start --head` with ports and a token of its own; ended by its process ids alone.

    `ray stop` would end every Ray of the machine.
    """
    home.mkdir(exist_ok=True)
    token = home / "token"
    token.write_text(secrets.token_hex(16))
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = clean | {
        "RAY_AUTH_TOKEN_PATH": str(token),
        "POTSTILL_CACHE": str(home / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    flags = {
        "port": free_port(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "num-cpus": 8,
    }
    # Sockets lie below it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = home / "head.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [
                    *(Path(sys.executable).with_name("ray"), "start", "--head", "--block"),
                    *(f"--{name}={value}" for name, value in flags.items()),
                    f"--temp-dir={folder}",
                ],
                env=environment | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        url, address = f"http://127.0.0.1:{port}", f"127.0.0.1:{flags['port']}"
        found = Head(url, environment, options, process.pid, address)
        try:
            wait_for(lambda: answers(found.url), process, log)
            yield found
        finally:
            end(process)


def tiny(model: Path, port: int) -> list[str]:
    models = [f"student.model={model}", f"teacher.model={model}", "teacher.few_shot=[]"]
    serving = [f"serving.port={port}", "serving.max_model_len=512"]
    return [*models, *serving, "engines.max_model_len=512"]


def answers(url: str) -> bool:
    """Whether the job server is up: without a token it refuses, which will do."""
    try:
        return requests.get(f"{url}/api/jobs/", timeout=5).status_code == 401
    except OSError:
        return False


def wait_for(condition, process, log, limit_s: float = START_LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def job_of(screen: str) -> str:
    return re.search(r"^submitted (raysubmit_\w+) to ", screen, re.MULTILINE)[1]


def test_a_run_that_the_cluster_refuses_comes_back_with_its_words_and_code(head, tmp_path):
    """The recipe passes here; only a look at its model, over there, finds it wrong."""
    gone = tmp_path / "no-model"
    ended = head.submit(tmp_path, f"student.model={gone}", "--wait")
    job = job_of(ended.stdout)
    assert ended.returncode == 2, ended.stdout
    assert re.search(rf"^error: .*{gone}", ended.stdout, re.MULTILINE), ended.stdout
    assert "state: FAILED, exit code 2\n" in ended.stdout
    again = head.potstill("logs", job, *head.at)
    assert again.returncode == 0
    assert f"{gone}" in again.stdout
    assert not (tmp_path / "run").exists()


def test_a_run_is_watched_and_stopped_and_may_go_on(head, tmp_path):
    sent = head.submit(tmp_path)
    assert sent.returncode == 0, sent.stdout
    job = job_of(sent.stdout)
    log = head.log_once_it_has(job, "joining Ray at")
    running = head.potstill("status", job, RAY_ADDRESS=head.url)
    assert "state: RUNNING\n" in running.stdout, running.stdout + log
    assert f"run: {tmp_path}/run, store: {tmp_path}/store\n" in running.stdout
    stopped = head.potstill("stop", job, *head.at)
    assert stopped.returncode == 0, stopped.stdout
    assert "state: STOPPED" in stopped.stdout
    followed = head.potstill("logs", job, *head.at, "--follow")
    assert followed.returncode == 75, followed.stdout
    assert "interrupted: the same command goes on from here\n" in followed.stdout
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_runs_models_are_served_on_a_cluster_that_demands_its_token(head, tmp_path):
    places = [f"run.folder={tmp_path}/run", f"run.store={tmp_path}/store"]
    config = load_config("configs/quickstart_small.yaml", [*places, *head.options])
    open_run(config)
    joining = {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "token"}
    url = f"http://127.0.0.1:{config.serving.port}/v1"
    with (tmp_path / "screen").open("w") as screen:
        serving = subprocess.Popen(
            [sys.executable, "potstill.py", "serve", f"{tmp_path}/run"],
            cwd=PROJECT,
            env=head.environment | joining,
            stdout=screen,
            stderr=subprocess.STDOUT,
        )
    try:
        told = tmp_path / "screen"
        wait_for(lambda: "serving at" in told.read_text(), serving, told, JOB_LIMIT_S)
        asked = head.potstill("ask", "Hello", "--model", "base", "--url", url)
        assert asked.returncode == 0, asked.stdout
    finally:
        end(serving)
    assert "stopping\n" in told.read_text()


# Longer than the 3 seconds that Ray gives by itself.
SLOW = """
import signal, time

def put_down(*_):
    time.sleep(6)
    print("put down")
    raise SystemExit

signal.signal(signal.SIGTERM, put_down)
print("up")
time.sleep(300)
"""
SEND = """
import sys
from pathlib import Path
from cluster.jobs.server import connect
from cluster.jobs.submit import Job, send_job

print(send_job(connect(sys.argv[1]), Job("python slow.py", Path(sys.argv[2]), [], 0, {})))
"""


def test_a_job_that_is_stopped_has_time_to_put_itself_down(head, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    sent = subprocess.run(
        [sys.executable, "-c", SEND, head.url, str(tmp_path)],
        cwd=PROJECT,
        env=head.environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    job = sent.stdout.strip()
    head.log_once_it_has(job, "up\n")
    assert head.potstill("stop", job, *head.at).returncode == 0
    assert "put down\n" in head.potstill("logs", job, *head.at).stdout


@pytest.mark.parametrize("token", ["", "0" * 32])
def test_who_has_no_token_or_a_wrong_one_is_told_so(head, token, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text(token)
    mode = "token" if token else "disabled"
    variables = {"RAY_AUTH_TOKEN_PATH": str(wrong), "RAY_AUTH_MODE": mode}
    refused = head.potstill("status", *head.at, **variables)
    assert refused.returncode == 2
    assert refused.stdout.startswith(f"error: the cluster at {head.url} wants its token")


# What the recipe that is sent says, and the other one does not.
NOT_SHRUNK = ["pairs.negatives=wrong"] + [
    f"task.{split}_prompts=null" for split in ("train", "validation", "test")
]


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_run_whose_head_is_lost_goes_on_when_it_is_sent_to_another(
    guesser, free_port, tmp_path, measured
):
    calm = write_recipe(tmp_path / "calm", guesser, free_port())
    options = ["evaluation.through=engines", "training.save_minutes=0.02"]
    assert go(calm, options).code == 0
    recipe = write_recipe(tmp_path / "moved", guesser, free_port())
    options += [*recipe.as_overrides(), *NOT_SHRUNK, f"student.model={guesser}"]
    with a_head(tmp_path / "first", free_port, options) as head:
        job = job_of(head.submit(recipe.home).stdout)
        deadline = time.monotonic() + 300
        while not RunFolder(location(str(recipe.run))).saved_steps():
            assert time.monotonic() < deadline, head.potstill("logs", job, *head.at)
            time.sleep(0.05)
        for process in family_of(head.pid):
            process.kill()
    with a_head(tmp_path / "second", free_port, options) as head:
        recovery, deadline = Recovery(recipe), time.monotonic() + 300
        job = head.submit_by_ray(recipe.home)
        while recovery.seconds is None:
            assert time.monotonic() < deadline, head.potstill("logs", job, *head.at)
            recovery.look()
            time.sleep(0.1)
        ended = head.potstill("logs", job, "--follow", *head.at, limit_s=600)
    measured(f"head lost: new work {recovery.seconds:.0f} s after the run was sent to another")
    assert ended.returncode == 0, ended.stdout
    assert re.search(r"going on after step \d+, with the optimizer's state", ended.stdout)
    assert sorted(recipe.keys()) == sorted(calm.keys())
    for epoch in (1, 2):
        assert recipe.losses(epoch) == pytest.approx(calm.losses(epoch), abs=1e-6)
