"""`potstill run` from end to end with the real engines, and killed in every stage of its way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
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
# An epoch and a sampling take seconds even here, since workers outlive their driver by one or two.
PROMPTS = {"train": 40, "validation": 6, "test": 8}
SAMPLES = 8
TRACES = PROMPTS["train"] * SAMPLES
EVALUATIONS = {"base_test", "teacher_test"} | {
    f"student-epoch-{epoch}_{split}" for epoch in (1, 2) for split in ("validation", "test")
}
SHOT = {
    "question": "Tom has 5 pens. How many pens?",
    "answer": "He starts with 5 pens and buys 3. The answer is \\boxed{8}.",
}
POLL_S, LOOKS_A_FAMILY, TIME_LIMIT_S, ORPHAN_LIMIT_S = 0.05, 20, 800, 20
# Ray's own, which hold nothing; they look for a cluster that is gone for up to a minute.
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
NOISE = r"WARN|INFO|ERROR|Traceback|Warning|pid=|it/s|\x1b|\r"


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

    def steps(self, epoch: int) -> list[int]:
        """Numbers of an epoch's training steps, in the order in which they were taken."""
        file = self.run / "metrics.jsonl"
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
        return [x["step"] for x in lines if x["stage"] == "train" and x["epoch"] == epoch]

    def evaluated(self) -> set[str]:
        return {file.stem for file in self.run.glob("evals/*.json")}

    def files(self) -> dict[str, int]:
        """What is on the disk, and when it was written."""
        return {str(path): path.stat().st_mtime_ns for path in self.home.rglob("*")}


@dataclass(frozen=True)
class Try:
    """How one try of a command ended."""

    code: int
    screen: str
    seconds: float


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
            env={**os.environ, "POTSTILL_CACHE": str(recipe.home / "cache")},
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
    assert [command_of(process) for process in left] == []
    return Try(driver.wait(), screen.read_text(), ended - started)


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


def write_data(folder: Path) -> Path:
    """Problems in the manner of GSM8K: the answers to half of them are 3, to the others 8."""
    folder.mkdir()
    first = 0
    for split, count in PROMPTS.items():
        rows = [
            {"question": f"Tom has {n} pens. How many pens?", "answer": f"#### {'38'[n % 2]}"}
            for n in range(first, first + count)
        ]
        first += count
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_recipe(home: Path, model: Path, port: int) -> Recipe:
    section = {"model": str(model), "dtype": "float32"}
    context = {"max_model_len": 256, "kv_cache_gib": 0.2}
    recipe = Recipe(home / "recipe.yaml")
    config = {
        "run": {"folder": str(recipe.run), "store": str(home / "store")},
        "task": {"name": "gsm8k", "data": str(write_data(home / "data"))},
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


@pytest.fixture(scope="module")
def whole(guesser, free_port, tmp_path_factory):
    """A run that nothing disturbed, and how it ended."""
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), guesser, free_port())
    ended = go(recipe)
    print(ended.screen, f"{ended.seconds:.0f} s")
    assert ended.code == 0, ended.screen
    return recipe, ended.screen


# Stage: how it is known to be under way, and the file that is there once it is done.
STAGES = {
    "teacher": (lambda recipe: recipe.keys(), "completions/teacher.parquet"),
    "student": (lambda recipe: len(recipe.keys()) > TRACES, "completions/student_000.parquet"),
    "epoch 1": (lambda recipe: recipe.steps(1), "checkpoints/epoch_001/PUBLISHED.json"),
    "resampling": (
        lambda recipe: len(recipe.keys()) > 2 * TRACES,
        "completions/student_001.parquet",
    ),
    "epoch 2": (lambda recipe: recipe.steps(2), "checkpoints/epoch_002/PUBLISHED.json"),
    "evaluation": (lambda recipe: recipe.evaluated(), "report.html"),
}


@pytest.fixture(scope="module")
def disturbed(guesser, free_port, tmp_path_factory):
    """A run that was killed in each stage, and what it said in the try after each kill."""
    recipe = write_recipe(tmp_path_factory.mktemp("disturbed"), guesser, free_port())
    screens, killed = {}, None
    for stage, (under_way, result) in STAGES.items():
        ended = go(recipe, until=lambda _, under_way=under_way: under_way(recipe))
        print(f"--- killed in {stage} after {ended.seconds:.0f} s\n{ended.screen}")
        assert ended.code == -signal.SIGKILL, ended.screen
        assert not (recipe.run / result).exists(), f"not killed in {stage}, but after it"
        screens[killed], killed = ended.screen, stage
    ended = go(recipe)
    print(f"--- {ended.seconds:.0f} s\n{ended.screen}")
    assert ended.code == 0, ended.screen
    return recipe, screens | {killed: ended.screen}


def test_the_screen_is_plain_lines_that_end_with_the_table(whole):
    recipe, screen = whole
    lines = screen.splitlines()
    assert [line for line in lines if re.search(NOISE, line)] == []
    wide = [line for line in lines if len(line) > 120]
    assert [line for line in wide if str(recipe.home) not in line and "ask:" not in line] == []
    for work in ("sampling teacher", "sampling student_001", "epoch 2/2", "teacher test"):
        assert any(line.startswith(work) and "(100 %)" in line for line in lines), work
    assert any(line.startswith("after epoch 2") for line in lines[-8:])
    assert recipe.evaluated() == EVALUATIONS
    assert (recipe.run / "report.html").exists()


SAID = {
    "teacher": [rf"teacher: \d+ of {TRACES} samples reused"],
    "student": ["traces of: teacher\n", rf"student_000: \d+ of {TRACES} samples reused"],
    "epoch 1": ["traces of: student_000, teacher\n", "drawn for epochs: 1\n", "trained: none yet"],
    "resampling": ["going on after step 400", rf"student_001: \d+ of {TRACES} samples reused"],
    "epoch 2": ["drawn for epochs: 1, 2\n", "going on after step 400"],
    "evaluation": ["epochs trained: 1, 2 of 2", "nothing to train", "1 of 6 results reused"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_goes_on_says_what_it_reuses(stage, disturbed):
    _, screens = disturbed
    assert [said for said in SAID[stage] if not re.search(said, screens[stage])] == []
    assert not re.search(NOISE, screens[stage])


def test_nothing_is_sampled_twice(disturbed, whole):
    keys = disturbed[0].keys()
    assert len(keys) == len(set(keys)) == 3 * TRACES
    assert set(keys) == set(whole[0].keys())


def test_no_finished_epoch_is_trained_again(disturbed, whole):
    for epoch in (1, 2):
        once, steps = whole[0].steps(epoch), disturbed[0].steps(epoch)
        killed_after = len(steps) - len(once)
        assert 0 < killed_after < len(once)
        assert steps == once[:killed_after] + once


def test_the_end_is_that_of_a_run_which_nothing_disturbed(disturbed, whole):
    ours, theirs = disturbed[0].run, whole[0].run
    for name in ("pairs/epoch_001/pairs.parquet", "pairs/epoch_002/pairs.parquet"):
        assert pq.read_table(ours / name).equals(pq.read_table(theirs / name))
    for name in EVALUATIONS:
        answers = pq.read_table(ours / f"evals/{name}.parquet")
        assert answers.equals(pq.read_table(theirs / f"evals/{name}.parquet")), name
    weights = [load_file(run / "checkpoints/epoch_002/model.safetensors") for run in (ours, theirs)]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_pairs_hold_what_both_students_got_wrong(whole):
    epochs = pq.read_table(whole[0].run / "pairs/epoch_002/pairs.parquet")[
        "rejected_epoch"
    ].to_pylist()
    assert {0, 1} <= set(epochs)


def test_a_finished_run_is_left_as_it_is(disturbed):
    recipe, _ = disturbed
    steps, keys, results = recipe.run / "metrics.jsonl", recipe.keys(), recipe.evaluated()
    before = steps.read_text()
    ended = go(recipe)
    assert ended.code == 0
    assert "6 of 6 results reused" in ended.screen
    assert (steps.read_text(), recipe.keys(), recipe.evaluated()) == (before, keys, results)


def test_another_recipe_is_refused(whole):
    recipe, _ = whole
    before = recipe.files()
    ended = go(recipe, ["pairs.phi=1.0"])
    assert ended.code == 2
    assert ended.screen.count("\n") == 1
    assert re.match(r"error: .*pairs.phi was 0.5 and is now 1.0.*run.folder", ended.screen)
    assert recipe.files() == before


def test_an_interruption_says_that_the_run_can_go_on(whole, guesser, free_port, tmp_path):
    recipe = write_recipe(tmp_path, guesser, free_port())
    ended = go(recipe, until=lambda screen: "sampling engine" in screen, how=signal.SIGINT)
    assert_interrupted(ended)
    # With another run's samples at hand training begins soon.
    shutil.copytree(whole[0].home / "store", recipe.home / "store", dirs_exist_ok=True)
    assert_interrupted(go(recipe, until=lambda _: recipe.steps(1), how=signal.SIGTERM))


def assert_interrupted(ended: Try) -> None:
    assert ended.code == 75, ended.screen
    assert ended.screen.endswith("interrupted: the same command goes on from here\n")
