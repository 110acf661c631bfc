"""Runs of `potstill run` in processes of their own: a tiny recipe, and ways to end a run early."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import yaml

PROJECT = Path(__file__).parents[2]
# An epoch and a sampling take seconds even here, since workers outlive their driver by one or two.
PROMPTS = {"train": 40, "validation": 6, "test": 8}
SAMPLES = 8
TRACES = PROMPTS["train"] * SAMPLES
SHOT = {
    "question": "Tom has 5 pens. How many pens?",
    "answer": "He starts with 5 pens and buys 3. The answer is \\boxed{8}.",
}
POLL_S, LOOKS_A_FAMILY, TIME_LIMIT_S, ORPHAN_LIMIT_S = 0.05, 20, 800, 20
# What must be in no file of a run.
SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_TEACHERS_KEY")
PLANTED = "planted-secret-8d1f"
# Ray's own, which hold nothing; they look for a cluster that is gone for up to a minute.
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True)
class Recipe:
    """A configuration file, and what its run leaves on the disk."""

    file: Path

    @property
    def home(self) -> Path:
        return self.file.parent

    @property
    def run(self) -> Path:
        return self.home / "run"

    def keys(self) -> list[str]:
        """Keys of the samples that are stored, as often as they are there."""
        files = [str(file).removesuffix(".ok") for file in (self.home / "store").rglob("*.ok")]
        return [key for file in files for key in pq.read_table(file)["key"].to_pylist()]

    def traced(self) -> list[str]:
        """Keys of the samples that pairs were drawn from."""
        files = (self.run / "completions").glob("*.parquet")
        return [key for file in files for key in pq.read_table(file)["key"].to_pylist()]

    def steps(self, epoch: int) -> list[int]:
        """Numbers of an epoch's training steps, in the order in which they were taken."""
        return [line["step"] for line in self._trained(epoch)]

    def losses(self, epoch: int) -> dict[int, float]:
        """Loss of each training step of an epoch, that of its last try."""
        return {line["step"]: line["loss"] for line in self._trained(epoch)}

    def _trained(self, epoch: int) -> list[dict]:
        file = self.run / "metrics.jsonl"
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
        return [line for line in lines if line["stage"] == "train" and line["epoch"] == epoch]

    def evaluated(self) -> set[str]:
        return {file.stem for file in self.run.glob("evals/*.json")}

    def work(self) -> int:
        """Files of samples, steps and results that are there; grows while a run gets on."""
        files = len([*(self.home / "store").rglob("*.ok")])
        return files + len(self.steps(1)) + len(self.steps(2)) + len(self.evaluated())

    def as_overrides(self) -> list[str]:
        """What the file says, as options over another recipe."""
        config = yaml.safe_load(self.file.read_text())
        return [
            f"{section}.{name}={json.dumps(value)}"
            for section, options in config.items()
            for name, value in options.items()
        ]

    def files(self) -> dict[str, int]:
        """What is on the disk, and when it was written."""
        return {str(path): path.stat().st_mtime_ns for path in self.home.rglob("*")}


@dataclass(frozen=True)
class Try:
    """How one try of a command ended."""

    code: int
    screen: str
    seconds: float


class Recovery:
    """Measures from now to the first new work of a run; look at it while the run goes on."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._before, self._began = recipe, recipe.work(), time.monotonic()
        self.seconds: float | None = None

    def look(self) -> None:
        if self.seconds is None and self._recipe.work() > self._before:
            self.seconds = time.monotonic() - self._began


def go(
    recipe: Recipe,
    overrides: Iterable[str] = (),
    until: Callable[[str], object] | None = None,
    how: signal.Signals = signal.SIGKILL,
) -> Try:
    """Run until the command ends, or signal its process once `until`, given the screen, holds.

    Fails where any process that it started outlives it.
    """
    screen = recipe.home.with_suffix(".screen")
    started, family = time.monotonic(), set[psutil.Process]()
    with screen.open("w") as stream:
        driver = subprocess.Popen(
            [sys.executable, "potstill.py", "run", str(recipe.file), *overrides],
            cwd=PROJECT,
            env={
                **dict.fromkeys(SECRETS, PLANTED),
                **os.environ,
                "POTSTILL_CACHE": str(recipe.home / "cache"),
            },
            stdout=stream,
            stderr=subprocess.STDOUT,
            # The background job of a shell ignores Ctrl-C, and all that it starts would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    looks = 0
    try:
        while driver.poll() is None and not (until and until(screen.read_text())):
            assert time.monotonic() - started < TIME_LIMIT_S, screen.read_text()
            if looks % LOOKS_A_FAMILY == 0:  # seldom: it reads all of /proc
                family |= children_of(driver.pid)
            looks += 1
            time.sleep(POLL_S)
        family |= children_of(driver.pid)
        driver.send_signal(how)
        driver.wait(60)
    finally:
        driver.kill()
    ended = time.monotonic()
    orphans = {process for process in family if not command_of(process).startswith(RAY_AGENTS)}
    _, left = psutil.wait_procs(orphans, timeout=ORPHAN_LIMIT_S)
    print(f"{len(family)} processes, gone after {time.monotonic() - ended:.1f} s")
    assert not left, [command_of(process) for process in left]
    return Try(driver.wait(), screen.read_text(), ended - started)


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all that it started, and nothing else."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def end(process: subprocess.Popen) -> None:
    """End a process and its family, by force those that take too long."""
    if process.poll() is not None:
        return
    family = family_of(process.pid)
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=20)
    for straggler in left:
        straggler.kill()
    _, left = psutil.wait_procs(left, timeout=10)
    assert left == []


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "gone"


def children_of(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def write_problems(folder: Path, counts: dict[str, int]) -> Path:
    """Problems in the manner of GSM8K: the answers to half of them are 3, to the others 8."""
    folder.mkdir(exist_ok=True)
    first = 0
    for split, count in counts.items():
        rows = [
            {"question": f"Tom has {n} pens. How many pens?", "answer": f"#### {'38'[n % 2]}"}
            for n in range(first, first + count)
        ]
        first += count
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_recipe(home: Path, model: Path, port: int) -> Recipe:
    """A run of two epochs on a guessing model, in an empty folder or a new one."""
    home.mkdir(exist_ok=True)
    section = {"model": str(model), "dtype": "float32"}
    context = {"max_model_len": 256, "kv_cache_gib": 0.2}
    recipe = Recipe(home / "recipe.yaml")
    config = {
        "run": {"folder": str(recipe.run), "store": str(home / "store")},
        "task": {"name": "gsm8k", "data": str(write_problems(home / "data", PROMPTS))},
        "teacher": section | {"few_shot": [SHOT]},
        "student": section | {"model": os.path.relpath(model, PROJECT)},
        "sampling": {"samples": SAMPLES, "max_new_tokens": 40, "max_rouge_l": 0.99},
        "training": {
            "epochs": 2,
            # Longer than the seconds that workers outlive a killed driver.
            "steps_per_epoch": 400,
            "learning_rate": 1e-4,
            "global_batch": 1,
            "micro_batch": 1,
            "max_length": 256,
            "precision": "fp32",
            "threads_per_worker": 1,
        },
        # Many small batches, so that there is time to kill the run between two of them.
        "engines": context | {"enforce_eager": True, "batch_rows": 8, "batches_in_flight": 1},
        "serving": context | {"port": port},
    }
    recipe.file.write_text(yaml.safe_dump(config))
    return recipe
