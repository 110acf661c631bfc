"""Checks a recipe, and sends it to a cluster as a job."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.jobs.parcel import (
    find_parcel,
    kept_back,
    refuse_large,
    refuse_left_behind,
    size_of,
)
from cluster.jobs.server import RUN_FOLDER, STORE, plain_errors, use_token
from cluster.recipes import load_recipe

_PROGRAM = "potstill.py"
# Ray ends a stopped job by force after this; its own 3 s are too few to put a run down.
STOP_GRACE_S = 60


@dataclass(frozen=True)
class Job:
    """A job that may be sent."""

    command: str
    folder: Path
    excludes: list[str]
    size: int
    """Bytes of the package that Ray makes of `folder` without `excludes`."""
    metadata: dict[str, str]


def plan_job(recipe: Path, overrides: Sequence[str], arm: str | None, folder: Path) -> Job:
    """The job that runs a recipe in a copy of `folder`. Sends nothing.

    Raises BadInputError for a recipe that is refused, and for what would be lost or missing on the
    cluster.
    """
    configs = load_recipe(recipe, overrides, arm)
    refuse_lost(configs, folder)
    excludes = kept_back(configs, folder)
    use_token()  # finding the parcel imports Ray
    parcel = find_parcel(folder, excludes)
    name = _name_in(parcel, recipe, folder)
    for config in configs:
        refuse_left_behind(config, parcel, folder)
    refuse_large(parcel, folder)
    chosen = ["--arm", arm] if arm else []
    command = shlex.join(["python", _PROGRAM, "run", name, *overrides, *chosen])
    folders = ", ".join(config.run.folder for config in configs)
    metadata = {RUN_FOLDER: folders, STORE: configs[-1].run.store}
    return Job(command, folder, excludes, size_of(parcel), metadata)


def refuse_lost(configs: Sequence[RunConfig], folder: Path) -> None:
    """Raise BadInputError where a run would be written into the job's copy of `folder`."""
    places: dict[str, str] = {}
    for config in configs:
        places |= {"run.folder": config.run.folder, "run.store": config.run.store}
    relative = {name: text for name, text in places.items() if _is_relative(text)}
    if relative:
        given = " and ".join(f"{name}={text}" for name, text in relative.items())
        here = " ".join(f"{name}={folder / text}" for name, text in relative.items())
        raise BadInputError(
            f"{given} would be lost: a job runs in a copy of the working folder that ends with "
            f"it. Give URLs such as s3://bucket/{next(iter(relative.values()))}, or absolute "
            f"paths that every node has: {here}"
        )


def _is_relative(text: str) -> bool:
    return "://" not in text and not text.startswith(("/", "~"))


def _name_in(parcel: dict[str, int], recipe: Path, folder: Path) -> str:
    """The recipe's path in the job's copy of `folder`, which must have the program too."""
    if _PROGRAM not in parcel:
        raise BadInputError(
            f"{folder} has no {_PROGRAM} for a job to run: call this from Potstill's own folder"
        )
    name = os.path.relpath(folder / recipe, folder)
    if name not in parcel:
        raise BadInputError(
            f"a job would not have the recipe {recipe}: expected a file below {folder}, outside "
            "runs, models, caches and what .gitignore names: copy it to configs/"
        )
    return name


def send_job(client: Any, job: Job) -> str:
    """Send a job to a cluster, which starts it at once; gives its id."""
    environment = {
        "working_dir": str(job.folder),
        "excludes": job.excludes,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)},
    }
    with plain_errors(client.get_address()):
        return client.submit_job(
            entrypoint=job.command,
            runtime_env=environment,
            metadata=job.metadata,
            entrypoint_num_cpus=0,
        )
