"""Training that stops or is stopped, and goes on: what it was given is neither lost nor redone."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
import torch
from upath import UPath

from cluster.errors import RunError
from cluster.progress import watched_board
from cluster.publishing import MARKER, discard_folder, is_published
from cluster.run_folder import RunFolder
from cluster.soundness import set_aside_damaged
from tests.integration.pairs import Holds, WritesPairs, publish_pairs
from tests.integration.trainings import (
    assert_same_weights,
    config_of,
    metrics_of,
    train_run,
    weights_of,
)
from training.stage import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def halted(ray_cluster, tiny_llama, tmp_path_factory) -> RunFolder:
    """A run of one worker in float32 that stopped between its two epochs: no pairs came."""
    run = RunFolder(UPath(tmp_path_factory.mktemp("halted")))
    publish_pairs(run, 1)
    config = config_of(run.root, tiny_llama, resample_timeout_s=15)
    with pytest.raises(RunError, match=r"pairs of epoch 2 did not come within 15 s: raise"):
        train(run, config, WritesPairs.remote(run, delay=60))
    assert run.saved_steps() == [3], "what was trained before is not lost"
    discard_folder(run.pairs(2))
    return run


def _copy(run: RunFolder, target: Path) -> RunFolder:
    shutil.copytree(str(run.root), target, dirs_exist_ok=True)
    return RunFolder(UPath(target))


@pytest.mark.fault
def test_training_goes_on_from_the_last_checkpoint_as_if_never_stopped(
    halted, reference, tiny_llama, tmp_path
):
    run, config = _copy(halted, tmp_path), config_of(tmp_path, tiny_llama)
    train(run, config, WritesPairs.remote(run))
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4, 5, 6], "trained a step twice"
    assert_same_weights(weights_of(run, 2), weights_of(reference, 2), atol=1e-6)
    train(run, config, resampler=None)  # all is there: nothing starts
    assert len(metrics_of(run)) == 6


@pytest.mark.fault
def test_a_damaged_student_is_made_again_as_it_was(reference, tiny_llama, tmp_path):
    run = _copy(reference, tmp_path)
    weights = run.checkpoint(1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    later = (run.checkpoint(2) / MARKER).stat().st_mtime_ns
    set_aside_damaged(run)
    assert run.epochs_published() == 0
    train(run, config_of(tmp_path, tiny_llama), WritesPairs.remote(run))
    assert_same_weights(weights_of(run, 1), weights_of(reference, 1), atol=1e-6)
    assert (run.checkpoint(2) / MARKER).stat().st_mtime_ns == later, "a whole one is kept"


TWO = {"workers": 2, "micro_batch": 2}
LONG_STAGES = [pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 2)]


@pytest.mark.fault
@pytest.mark.parametrize("zero_stage", [*LONG_STAGES, 3])
def test_what_one_worker_began_two_may_end_at_any_zero_stage(
    zero_stage, halted, reference, tiny_llama, tmp_path
):
    run = _copy(halted, tmp_path)
    config = config_of(tmp_path, tiny_llama, zero_stage=zero_stage, **TWO)
    train(run, config, WritesPairs.remote(run))
    for ours, theirs in zip(metrics_of(run), metrics_of(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), ours["step"]
    assert_same_weights(weights_of(run, 2), weights_of(reference, 2), atol=1e-5)


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_two_workers_began_at_any_zero_stage_one_may_end(
    zero_stage, reference, tiny_llama, tmp_path
):
    run = RunFolder(UPath(tmp_path))
    publish_pairs(run, 1)
    config = config_of(tmp_path, tiny_llama, zero_stage=zero_stage, **TWO)
    with pytest.raises(RunError, match="epoch 2 has 5 pairs, expected 11"):
        train(run, config, WritesPairs.remote(run, {2: 5}))
    discard_folder(run.pairs(2))
    train(run, config_of(tmp_path, tiny_llama), WritesPairs.remote(run))
    for ours, theirs in zip(metrics_of(run), metrics_of(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), ours["step"]
    assert_same_weights(weights_of(run, 2), weights_of(reference, 2), atol=1e-5)


@pytest.mark.fault
@pytest.mark.long
def test_a_sharded_run_in_bf16_may_go_on_whole(reference, tiny_llama, tmp_path):
    run = RunFolder(UPath(tmp_path))
    publish_pairs(run, 1)
    config = config_of(tmp_path, tiny_llama, precision="bf16", zero_stage=3, **TWO)
    with pytest.raises(RunError, match="epoch 2 has 5 pairs, expected 11"):
        train(run, config, WritesPairs.remote(run, {2: 5}))
    discard_folder(run.pairs(2))
    train(run, config_of(tmp_path, tiny_llama, precision="bf16"), WritesPairs.remote(run))
    # bf16 rounds weights and activations to 8 bits; what must agree is the course of the run.
    for ours, theirs in zip(metrics_of(run), metrics_of(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05), ours["step"]
    assert {weight.dtype for weight in weights_of(run, 2).values()} == {torch.bfloat16}


def test_ctrl_c_in_training_is_an_interruption(tiny_llama, tmp_path):
    run, handler = RunFolder(UPath(tmp_path)), signal.getsignal(signal.SIGINT)
    publish_pairs(run, 1)

    def interrupt():
        while not is_published(run.checkpoint(1)):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(run, config_of(tmp_path, tiny_llama), WritesPairs.remote(run, delay=60))
    assert signal.getsignal(signal.SIGINT) is handler


LONG = {"epochs": 1, "steps_per_epoch": 150}


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tiny_llama, tmp_path_factory) -> RunFolder:
    """A run of one long epoch."""
    return train_run(tmp_path_factory.mktemp("undisturbed"), tiny_llama, **LONG)


def _at_step(run: RunFolder, step: int, act: Callable[[], None]) -> threading.Thread:
    """Act as soon as a run has recorded a step."""
    return _once(lambda: run.metrics_file.exists() and len(metrics_of(run)) >= step, act)


def _once(condition: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        while not condition():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def _assert_as_undisturbed(
    run: RunFolder, undisturbed: RunFolder, within: float = 1e-6
) -> list[int]:
    """Steps and losses are those of an undisturbed run; gives steps that were taken twice."""
    steps = [line["step"] for line in metrics_of(run)]
    assert sorted(set(steps)) == list(range(1, 151))
    losses = {line["step"]: line["loss"] for line in metrics_of(undisturbed)}
    assert {line["step"]: line["loss"] for line in metrics_of(run)} == pytest.approx(
        losses, abs=within
    )
    assert_same_weights(weights_of(run, 1), weights_of(undisturbed, 1), atol=within)
    return sorted({step for step in steps if steps.count(step) > 1})


@pytest.mark.fault
def test_sigterm_saves_in_the_midst_of_an_epoch(
    undisturbed, tiny_llama, tmp_path, capsys, measured
):
    run, config = RunFolder(UPath(tmp_path)), config_of(tmp_path, tiny_llama, **LONG)
    publish_pairs(run, 1)
    asked = []

    def ask_to_stop() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    _at_step(run, 20, ask_to_stop)
    with watched_board() as board, pytest.raises(KeyboardInterrupt):
        train(run, config, None, board)
    measured(f"SIGTERM in training: saved and ended after {time.monotonic() - asked[0]:.1f} s")
    assert "asked to stop: saving" in capsys.readouterr().out
    done = len(metrics_of(run))
    assert run.saved_steps() == [done]
    assert 20 <= done < 150
    with watched_board() as board:
        train(run, config, None, board)
    assert _assert_as_undisturbed(run, undisturbed) == [], "no step is lost"


def _workers() -> list[psutil.Process]:
    family = psutil.Process().children(recursive=True)
    return [process for process in family if process.name().startswith("ray::RayTrainW")]


# ZeRO-3 goes on with other workers in the tests of a halted run above.
ELASTIC = LONG | {"workers": 2, "min_workers": 1, "micro_batch": 2, "cpus_per_worker": 3}


@pytest.mark.fault
@pytest.mark.long
def test_training_starts_with_the_worker_that_finds_room_and_takes_in_the_other(
    undisturbed, tiny_llama, tmp_path, capsys
):
    run = RunFolder(UPath(tmp_path))
    config = config_of(tmp_path, tiny_llama, zero_stage=1, **ELASTIC)
    publish_pairs(run, 1)
    other = Holds.remote()
    ray.get(other.__ray_ready__.remote())
    _at_step(run, 20, lambda: ray.kill(other))
    with watched_board() as board:
        train(run, config, None, board)
    said = capsys.readouterr().out
    assert "starting 1 of 2 worker(s)" in said
    assert said.index("room for 2 workers") < said.index("starting 2 worker(s)")
    assert _assert_as_undisturbed(run, undisturbed, within=1e-5) == [], "no step is lost"


@pytest.mark.fault
@pytest.mark.long
def test_training_goes_on_with_one_worker_where_the_other_is_lost(
    undisturbed, tiny_llama, tmp_path, capsys
):
    run = RunFolder(UPath(tmp_path))
    config = config_of(tmp_path, tiny_llama, save_minutes=0.01, zero_stage=2, **ELASTIC)
    publish_pairs(run, 1)
    others = []

    def lose_one() -> None:
        others.append(Holds.remote())  # takes the place of the one that goes
        _workers()[-1].kill()

    losing = _once(run.saved_steps, lose_one)
    train(run, config, None)
    assert not losing.is_alive()
    said = capsys.readouterr().out
    assert said.index("starting 2 worker(s)") < said.index("training lost worker")
    assert said.index("training lost worker") < said.index("starting 1 of 2 worker(s)")
    again = _assert_as_undisturbed(run, undisturbed, within=1e-5)
    assert 1 not in again, "it did not begin anew"
    ray.kill(others[0])


@pytest.mark.fault
def test_a_killed_worker_is_replaced_and_goes_on_from_the_last_saved_state(
    undisturbed, tiny_llama, tmp_path, measured, capsys
):
    run = RunFolder(UPath(tmp_path))
    config = config_of(tmp_path, tiny_llama, save_minutes=0.01, **LONG)
    publish_pairs(run, 1)

    def kill_worker() -> None:
        (worker,) = _workers()
        worker.kill()
        killed, before = time.monotonic(), len(metrics_of(run))
        _at_step(run, before + 1, lambda: None).join()
        measured(f"training worker killed: next step after {time.monotonic() - killed:.0f} s")

    killing = _once(run.saved_steps, kill_worker)
    train(run, config, None)
    assert not killing.is_alive()
    assert "training lost worker 0 of 1: going on" in capsys.readouterr().out
    again = _assert_as_undisturbed(run, undisturbed)
    assert 1 not in again, "it did not begin anew"
    assert len(metrics_of(run)) > 150 - 1
