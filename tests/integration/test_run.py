"""`potstill run` from end to end with the real engines, and killed in every stage of its way."""

import json
import re
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cluster.lock import locked
from cluster.storage import location
from tests.integration.runs import PLANTED, TRACES, Recipe, Recovery, Try, go, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

EVALUATIONS = {"base_test", "teacher_test"} | {
    f"student-epoch-{epoch}_{split}" for epoch in (1, 2) for split in ("validation", "test")
}
THROUGH_ENGINES = ["evaluation.through=engines"]  # which spares a start of each model
NOISE = r"WARN|INFO|ERROR|Traceback|Warning|pid=|it/s|\x1b|\r"


@pytest.fixture(scope="module")
def whole(guesser, free_port, tmp_path_factory):
    """A run that nothing disturbed, and how it ended."""
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), guesser, free_port())
    ended = go(recipe, THROUGH_ENGINES)
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


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(["epoch 2"], id="once"),
        pytest.param([*STAGES], id="in each stage", marks=[pytest.mark.fault, pytest.mark.long]),
    ],
)
def disturbed(request, whole, guesser, free_port, tmp_path_factory, measured):
    """A run that was killed in one or all stages, and what it said in the try after each kill."""
    recipe = write_recipe(tmp_path_factory.mktemp("disturbed"), guesser, free_port())
    stages = request.param
    if stages != [*STAGES]:  # what is not put to the test is made short
        share_samples(whole[0], recipe)
    screens = {}
    for killed, stage in pairwise([None, *stages, None]):
        recovery = Recovery(recipe)
        under_way, result = STAGES.get(stage, (lambda _: False, None))

        def look(_, recovery=recovery, under_way=under_way) -> object:
            recovery.look()
            return under_way(recipe)

        ended = go(recipe, THROUGH_ENGINES, until=look)
        assert ended.code == (-signal.SIGKILL if stage else 0), ended.screen
        assert not (stage and (recipe.run / result).exists()), f"killed after {stage}, not in it"
        if killed:
            screens[killed] = ended.screen
            measured(f"driver killed in {killed}: new work after {recovery.seconds:.0f} s")
    return recipe, screens


def share_samples(giver: Recipe, taker: Recipe) -> None:
    """Put all samples that a run has drawn at the hand of another."""
    shutil.copytree(giver.home / "store", taker.home / "store", dirs_exist_ok=True)


def test_the_screen_is_plain_lines_that_end_with_the_table(whole):
    recipe, screen = whole
    lines = screen.splitlines()
    assert [line for line in lines if re.search(NOISE, line)] == []
    wide = [line for line in lines if len(line) > 120]
    assert [line for line in wide if str(recipe.home) not in line and "ask:" not in line] == []
    for work in ("sampling teacher", "sampling student_001", "epoch 2/2"):
        assert any(line.startswith(work) and "(100 %)" in line for line in lines), work
    assert any(line.startswith("teacher test: accuracy") for line in lines)
    assert any(line.startswith("after epoch 2") for line in lines[-8:])
    assert recipe.evaluated() == EVALUATIONS
    assert (recipe.run / "report.html").exists()


SAID = {
    "teacher": [rf"teacher: \d+ of {TRACES} samples reused"],
    "student": ["traces of: teacher\n", rf"student_000: \d+ of {TRACES} samples reused"],
    "epoch 1": ["traces of: student_000, teacher\n", "drawn for epochs: 1\n", "trained: none yet"],
    "resampling": ["going on after step 400", rf"student_001: \d+ of {TRACES} samples reused"],
    "epoch 2": ["drawn for epochs: 1, 2\n", "going on after step 400"],
    "evaluation": ["epochs trained: 1, 2 of 2", "nothing to train", r"[1-3] of 6 results reused"],
}


def test_a_run_that_goes_on_says_what_it_reuses(disturbed):
    _, screens = disturbed
    for stage, screen in screens.items():
        assert [said for said in SAID[stage] if not re.search(said, screen)] == [], screen
        assert not re.search(NOISE, screen)


def test_nothing_is_sampled_twice(disturbed, whole):
    assert_same_samples(disturbed[0], whole[0])


def test_no_finished_epoch_is_trained_again(disturbed, whole):
    recipe, screens = disturbed
    for epoch in (1, 2):
        once, steps = whole[0].steps(epoch), recipe.steps(epoch)
        killed_after = len(steps) - len(once)
        assert killed_after < len(once)
        assert (killed_after > 0) == (f"epoch {epoch}" in screens)
        assert steps == once[:killed_after] + once


def test_the_end_is_that_of_a_run_which_nothing_disturbed(disturbed, whole):
    assert_as_undisturbed(disturbed[0], whole[0])


def assert_same_samples(recipe: Recipe, undisturbed: Recipe) -> None:
    """None is lost and none is there twice; evaluations through engines store some too."""
    keys, wanted = recipe.keys(), undisturbed.traced()
    assert len(wanted) == len(set(wanted)) == 3 * TRACES
    assert len(keys) == len(set(keys))
    assert set(keys) >= set(wanted) == set(recipe.traced())


def assert_as_undisturbed(recipe: Recipe, undisturbed: Recipe) -> None:
    """Samples, pairs, answers and weights are those of a run that nothing disturbed."""
    assert_same_samples(recipe, undisturbed)
    ours, theirs = recipe.run, undisturbed.run
    for name in ("pairs/epoch_001/pairs.parquet", "pairs/epoch_002/pairs.parquet"):
        assert pq.read_table(ours / name).equals(pq.read_table(theirs / name))
    for epoch in (1, 2):
        assert recipe.losses(epoch) == pytest.approx(undisturbed.losses(epoch), abs=1e-6)
    for name in EVALUATIONS:
        answers = pq.read_table(ours / f"evals/{name}.parquet")
        assert answers.equals(pq.read_table(theirs / f"evals/{name}.parquet")), name
    weights = [load_file(run / "checkpoints/epoch_002/model.safetensors") for run in (ours, theirs)]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_the_student_is_right_more_often_after_an_epoch(whole):
    lines = (whole[0].run / "metrics.jsonl").read_text().splitlines()
    sampled = [line for line in map(json.loads, lines) if line["stage"] == "sample"]
    right = {line["model"]: line["right"] for line in sampled}
    assert right["student_001"] > right["student_000"]


def test_no_secret_is_in_any_file_of_a_run(whole):
    files = [path for path in whole[0].home.rglob("*") if path.is_file()]
    assert any(path.parent.name == "logs" for path in files)
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []


@pytest.mark.fault
def test_a_second_run_on_one_folder_is_refused(whole):
    recipe, _ = whole
    before = recipe.files()
    with locked(location(str(recipe.run))):
        ended = go(recipe, THROUGH_ENGINES)
    assert ended.code == 2
    assert re.fullmatch(r"error: .*another process.*\n", ended.screen)
    assert recipe.files() == before


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


@pytest.mark.fault
def test_another_recipe_is_refused(whole):
    recipe, _ = whole
    before = recipe.files()
    ended = go(recipe, ["pairs.phi=1.0"])
    assert ended.code == 2
    assert ended.screen.count("\n") == 1
    assert re.match(r"error: .*pairs.phi was 0.5 and is now 1.0.*run.folder", ended.screen)
    assert recipe.files() == before


@pytest.mark.fault
@pytest.mark.long
def test_an_interruption_says_that_the_run_can_go_on(whole, guesser, free_port, tmp_path):
    recipe = write_recipe(tmp_path, guesser, free_port())
    ended = go(recipe, until=lambda screen: "sampling engine" in screen, how=signal.SIGINT)
    assert_interrupted(ended)
    share_samples(whole[0], recipe)
    assert_interrupted(go(recipe, until=lambda _: recipe.steps(1), how=signal.SIGTERM))


def assert_interrupted(ended: Try) -> None:
    assert ended.code == 75, ended.screen
    assert ended.screen.endswith("interrupted: the same command goes on from here\n")


@pytest.fixture
def disks(tmp_path):
    """Small disks by their place, that can be made larger."""
    places = [tmp_path / name for name in ("store", "run/pairs", "run/checkpoints")]
    mounted = []
    for place in places:
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may not mount a disk of memory")
        mounted.append(place)
    yield places
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.fault
@pytest.mark.long
def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(
    whole, guesser, free_port, tmp_path, disks
):
    recipe = write_recipe(tmp_path, guesser, free_port())
    for place in disks:  # samples, then pairs, then a checkpoint find no room
        ended = go(recipe, THROUGH_ENGINES)
        assert ended.code == 1, ended.screen
        assert re.search(rf"\nstopped: {place}/.* cannot be written .*free space", ended.screen)
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    assert go(recipe, THROUGH_ENGINES).code == 0
    assert_as_undisturbed(recipe, whole[0])


def keys_in(file: Path) -> list[str]:
    return pq.read_table(file)["key"].to_pylist()


def cut(path: Path) -> None:
    """As a disk that lost its power leaves a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit, in the midst of a file."""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


@pytest.mark.fault
@pytest.mark.long
def test_what_was_damaged_is_made_again(whole, tmp_path, measured):
    recipe, _ = whole
    intact = Recipe(shutil.copytree(recipe.home, tmp_path / "intact") / recipe.file.name)
    drawn = set(keys_in(recipe.run / "completions/teacher.parquet"))
    stored = (recipe.home / "store").rglob("*.parquet")
    samples = next(file for file in stored if not drawn.isdisjoint(keys_in(file)))
    damaged = {
        samples: flip,
        recipe.run / "completions/teacher.parquet": cut,
        recipe.run / "pairs/epoch_002/pairs.parquet": flip,
        recipe.run / "checkpoints/epoch_001/model.safetensors": cut,
        recipe.run / "evals/base_test.json": cut,
    }
    for path, damage in damaged.items():
        damage(path)
    ended = go(recipe, THROUGH_ENGINES)
    measured(f"five files damaged: made again in {ended.seconds:.0f} s")
    assert ended.code == 0, ended.screen
    aside = {path.name.partition(".damaged-")[0] for path in recipe.home.rglob("*.damaged-*")}
    folders = {"epoch_001", "epoch_002"}  # of the checkpoint and of the pairs
    assert aside == {samples.name, "teacher.parquet", "base_test.json", *folders}
    assert_as_undisturbed(recipe, intact)
