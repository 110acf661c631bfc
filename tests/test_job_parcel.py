"""What a job takes along and what it is told to run, up to the door of the cluster."""

import os
import re
import shlex
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from cluster.errors import BadInputError
from cluster.jobs import parcel as parcels
from cluster.jobs.parcel import find_parcel, kept_back, refuse_large, size_of
from cluster.jobs.server import connect
from cluster.jobs.submit import plan_job, send_job

pytestmark = pytest.mark.usefixtures("no_ray_settings")

RECIPE = """
run: {folder: /shared/run, store: /shared/store}
task: {name: gsm8k}
teacher: {model: a}
student: {model: b}
"""


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
    assert send_job(connect(server.url), job) == "raysubmit_1"
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
    send_job(connect(server.url), job)
    names = set(zipfile.ZipFile(BytesIO(server.packages[0])).namelist())
    assert names == SHIPPED | {"out/big", "train.log", "pipeline/secret"}
    assert len(server.packages[0]) == job.size


def test_the_command_means_in_a_shell_what_was_typed(folder, job_server):
    awkward = "teacher.stop=['; rm -rf $HOME', \"it's\"]"
    server = job_server()
    job = plan(folder, awkward, "training.epochs=1", arm="mixed_policy_orpo")
    send_job(connect(server.url), job)
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
        ("task.data=./pipeline/../pipeline/open", True),
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
