"""`potstill run` from end to end with the real engines, and killed in every stage of its way."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

PROJECT = Path(__file__).parents[2]
PROMPTS = {"train": 16, "validation": 6, "test": 8}
SAMPLES = 4
TRACES = PROMPTS["train"] * SAMPLES
EVALUATIONS = {"base_test", "teacher_test"} | {
    f"student-epoch-{epoch}_{split}" for epoch in (1, 2) for split in ("validation", "test")
}
SHOT = {
    "question": "Tom has 5 pens. How many pens?",
    "answer": "He starts with 5 pens and buys 3. The answer is \\boxed{8}.",
}
POLL_S, STAGE_LIMIT_S, ORPHAN_LIMIT_S = 0.02, 400, 20


@dataclass(frozen=True)
class Recipe:
    """A configuration file, and what its run leaves on the disk."""

    file: Path

    @property
    def folder(self) -> Path:
        return self.file.parent / "run"

    @property
    def store(self) -> Path:
        return self.file.parent / "store"

    def keys(self) -> list[str]:
        """Keys of the samples that are stored, as often as they are there."""
        files = [str(marker).removesuffix(".ok") for marker in self.store.rglob("*.ok")]
        return [key for file in files for key in pq.read_table(file)["key"].to_pylist()]

    def steps(self, epoch: int) -> list[int]:
        """Numbers of an epoch's training steps, in the order in which they were taken."""
        file = self.folder / "metrics.jsonl"
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
        return [x["step"] for x in lines if x["stage"] == "train" and x["epoch"] == epoch]

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def evaluated(self) -> set[str]:
        return {file.stem for file in self.folder.glob("evals/*.json")}

    def files(self) -> set[str]:
        return {str(path.relative_to(self.file.parent)) for path in self.file.parent.rglob("*")}


def go(recipe: Recipe, *overrides: str, until: Callable[[], bool] | None = None):
    """Run until the command ends, or kill it once `until` holds; its exit code and its screen.

    Fails where any process that it started outlives it.
    """
    screen = recipe.file.parent.with_suffix(".screen")
    with screen.open("w") as stream:
        driver = subprocess.Popen(
            [sys.executable, "potstill.py", "run", str(recipe.file), *overrides],
            cwd=PROJECT,
            env={**os.environ, "POTSTILL_CACHE": str(recipe.file.parent / "cache")},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    family: set[psutil.Process] = set()
    deadline = time.monotonic() + STAGE_LIMIT_S
    try:
        while driver.poll() is None and not (until and until()):
            assert time.monotonic() < deadline, screen.read_text()
            family |= children_of(driver.pid)
            time.sleep(POLL_S)
    finally:
        driver.kill()
    code, started = driver.wait(), time.monotonic()
    _, orphans = psutil.wait_procs(family, timeout=ORPHAN_LIMIT_S)
    print(f"{len(family)} processes, gone after {time.monotonic() - started:.1f} s")
    assert [" ".join(process.cmdline()) for process in orphans] == []
    return code, screen.read_text()


def children_of(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def write_data(folder: Path) -> Path:
    """Problems in the manner of GSM8K; each second one is answered by 3, the others by 8."""
    folder.mkdir(parents=True)
    number = 0
    for split, count in PROMPTS.items():
        rows = []
        for _ in range(count):
            number += 1
            gold = "38"[number % 2]
            rows.append(
                {"question": f"Tom has {number} pens. How many pens?", "answer": f"#### {gold}"}
            )
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_recipe(folder: Path, model: Path) -> Recipe:
    recipe = Recipe(folder / "recipe.yaml")
    section = {"model": str(model), "dtype": "float32"}
    config = {
        "run": {"folder": str(recipe.folder), "store": str(recipe.store)},
        "task": {"name": "gsm8k", "data": str(write_data(folder / "data"))},
        "teacher": section | {"few_shot": [SHOT]},
        "student": section,
        "sampling": {"samples": SAMPLES, "max_new_tokens": 40, "max_rouge_l": 0.99},
        "pairs": {"phi": 0.5, "negatives": "wrong"},
        "training": {
            "epochs": 2,
            "learning_rate": 3e-4,
            "global_batch": 1,
            "micro_batch": 1,
            "max_length": 256,
            "precision": "fp32",
            "threads_per_worker": 1,
        },
        "engines": {
            "max_model_len": 256,
            "kv_cache_gib": 0.2,
            "enforce_eager": True,
            "batch_rows": 2,
            "batches_in_flight": 1,
        },
        "serving": {"port": free_port(), "max_model_len": 256, "kv_cache_gib": 0.2},
    }
    recipe.file.write_text(yaml.safe_dump(config))
    return recipe


@pytest.fixture(scope="module")
def whole(guesser, tmp_path_factory):
    """A run that nothing disturbed, and what it said."""
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), guesser)
    code, screen = go(recipe)
    print(screen)
    assert code == 0, screen
    return recipe, screen


def test_a_run_says_how_far_it_is_and_ends_with_the_table(whole):
    recipe, screen = whole
    assert recipe.evaluated() == EVALUATIONS
    assert all(recipe.has(name) for name in ("report.html", "README.md"))
