"""Ray Train and DeepSpeed on tiny models: parity of layouts, resume, checkpoints, and refusals."""

import json
import os
import re
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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from upath import UPath

from cluster import storage
from cluster.config import RunConfig, parse_config
from cluster.errors import RunError
from cluster.progress import watched_board
from cluster.publishing import MARKER, discard_folder, is_published
from cluster.run_folder import RunFolder
from cluster.session import NO_DASHBOARD
from cluster.soundness import set_aside_damaged
from pipeline.anchors import asked_of
from pipeline.chat import load_chat
from pipeline.logprobs import ResponseLogProbs
from pipeline.rows import Anchor, to_table
from tests.integration.pairs import PAIRS, Holds, WritesPairs, pair_of, publish_pairs
from training.batches import count_batch, global_batches, tokenize_pair
from training.objectives import Objective
from training.stage import train
from training.step import collate_pairs

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    ray.init(
        address="local",  # and not a cluster that happens to run here
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"RAY_TRAIN_V2_ENABLED": "1"} | NO_DASHBOARD},
    )
    yield
    ray.shutdown()


def _publish_scores(run: RunFolder, config: RunConfig) -> None:
    """Scores of the first epoch's pairs as if reference and teacher found a token's chance 1/e."""
    pairs = [pair_of(index, 1) for index in range(PAIRS)]
    chat = load_chat(Path(config.student.model))
    anchors = [
        Anchor(reader, text.key, "model", -float(len(chat.response_ids(text.response, True))), 1)
        for reader in config.scored_by
        for text in asked_of(reader, pairs, config, chat)
    ]
    storage.write_table(to_table(Anchor, anchors), run.scores(1))


def _config(folder: Path, model: Path, **training) -> RunConfig:
    settings = {
        "epochs": 2,
        "global_batch": 4,
        "micro_batch": 4,
        "learning_rate": 2e-3,
        "precision": "fp32",
        "threads_per_worker": 1,
        "resample_timeout_s": 120,
    }
    return parse_config(
        {
            "run": {"folder": str(folder), "seed": 3},
            "task": {"name": "word_problems"},
            "teacher": {"model": str(model)},
            "student": {"model": str(model)},
            "cluster": {"accelerator": "cpu"},
            "training": settings | training,
        },
        source="test",
    )


def _train(folder: Path, model: Path, **training) -> RunFolder:
    run, config = RunFolder(UPath(folder)), _config(folder, model, **training)
    if not is_published(run.pairs(1)):
        run.root.mkdir(parents=True, exist_ok=True)
        publish_pairs(run, 1)
    train(run, config, WritesPairs.remote(run))
    return run


def _metrics(run: RunFolder) -> list[dict]:
    lines = (run.root / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"train"' in line]


def _weights(run: RunFolder, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(str(run.checkpoint(epoch) / "model.safetensors"))


def _assert_same_weights(one: dict, other: dict, atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=name)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_llama) -> RunFolder:
    """One worker, whole batches, float32: what the other layouts are held against."""
    return _train(tmp_path_factory.mktemp("reference"), tiny_llama)


# ZeRO-2 with two workers is below, in the preferences.
LAYOUTS = {
    "four micro-batches": {"micro_batch": 1},
    "two workers": {"workers": 2, "micro_batch": 1},
    "two workers, ZeRO-3": {"workers": 2, "micro_batch": 1, "zero_stage": 3},
    "checkpointing, offload": {
        "gradient_checkpointing": True,
        "zero_stage": 1,
        "offload": "optimizer",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_neither_losses_nor_weights(layout, reference, tiny_llama, tmp_path):
    run = _train(tmp_path, tiny_llama, **LAYOUTS[layout])
    for ours, theirs in zip(_metrics(run), _metrics(reference), strict=True):
        for name in ("loss", "nll", "odds_ratio", "margin", "learning_rate", "chosen_logp"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (ours["step"], name)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    _assert_same_weights(_weights(run, 2), _weights(reference, 2), atol=1e-5)


def test_the_loss_falls_and_a_line_is_recorded_for_each_step(reference):
    lines = _metrics(reference)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert lines[-1]["learning_rate"] < lines[3]["learning_rate"] < lines[0]["learning_rate"]
    assert sum(line["without_negative"] for line in lines) == 2 * 2
    assert all(line["tokens_per_second"] > 0 and 0 <= line["padding"] < 0.5 for line in lines)


def test_a_checkpoint_is_an_ordinary_model_and_only_it_is_kept(reference, tiny_llama):
    folder = str(reference.checkpoint(2))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert tokenizer.convert_tokens_to_ids("<|end|>") in model.generation_config.eos_token_id
    for name, tensor in _weights(reference, 2).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=0, rtol=0)
    assert model.dtype == torch.float32
    assert reference.saved_steps() == []
    assert not list(reference.root.glob("*/.staging*/*"))


@pytest.fixture(scope="module")
def halted(tiny_llama, tmp_path_factory) -> RunFolder:
    """A run of one worker in float32 that stopped between its two epochs: no pairs came."""
    run = RunFolder(UPath(tmp_path_factory.mktemp("halted")))
    publish_pairs(run, 1)
    config = _config(run.root, tiny_llama, resample_timeout_s=15)
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
    run, config = _copy(halted, tmp_path), _config(tmp_path, tiny_llama)
    train(run, config, WritesPairs.remote(run))
    assert [line["step"] for line in _metrics(run)] == [1, 2, 3, 4, 5, 6], "trained a step twice"
    _assert_same_weights(_weights(run, 2), _weights(reference, 2), atol=1e-6)
    train(run, config, resampler=None)  # all is there: nothing starts
    assert len(_metrics(run)) == 6


@pytest.mark.fault
def test_a_damaged_student_is_made_again_as_it_was(reference, tiny_llama, tmp_path):
    run = _copy(reference, tmp_path)
    weights = run.checkpoint(1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    later = (run.checkpoint(2) / MARKER).stat().st_mtime_ns
    set_aside_damaged(run)
    assert run.epochs_published() == 0
    train(run, _config(tmp_path, tiny_llama), WritesPairs.remote(run))
    _assert_same_weights(_weights(run, 1), _weights(reference, 1), atol=1e-6)
    assert (run.checkpoint(2) / MARKER).stat().st_mtime_ns == later, "a whole one is kept"


TWO = {"workers": 2, "micro_batch": 2}
LONG_STAGES = [pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 2)]


@pytest.mark.fault
@pytest.mark.parametrize("zero_stage", [*LONG_STAGES, 3])
def test_what_one_worker_began_two_may_end_at_any_zero_stage(
    zero_stage, halted, reference, tiny_llama, tmp_path
):
    run = _copy(halted, tmp_path)
    config = _config(tmp_path, tiny_llama, zero_stage=zero_stage, **TWO)
    train(run, config, WritesPairs.remote(run))
    for ours, theirs in zip(_metrics(run), _metrics(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), ours["step"]
    _assert_same_weights(_weights(run, 2), _weights(reference, 2), atol=1e-5)


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_two_workers_began_at_any_zero_stage_one_may_end(
    zero_stage, reference, tiny_llama, tmp_path
):
    run = RunFolder(UPath(tmp_path))
    publish_pairs(run, 1)
    config = _config(tmp_path, tiny_llama, zero_stage=zero_stage, **TWO)
    with pytest.raises(RunError, match="epoch 2 has 5 pairs, expected 11"):
        train(run, config, WritesPairs.remote(run, {2: 5}))
    discard_folder(run.pairs(2))
    train(run, _config(tmp_path, tiny_llama), WritesPairs.remote(run))
    for ours, theirs in zip(_metrics(run), _metrics(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), ours["step"]
    _assert_same_weights(_weights(run, 2), _weights(reference, 2), atol=1e-5)


@pytest.mark.fault
def test_a_sharded_run_in_bf16_may_go_on_whole(reference, tiny_llama, tmp_path):
    run = RunFolder(UPath(tmp_path))
    publish_pairs(run, 1)
    config = _config(tmp_path, tiny_llama, precision="bf16", zero_stage=3, **TWO)
    with pytest.raises(RunError, match="epoch 2 has 5 pairs, expected 11"):
        train(run, config, WritesPairs.remote(run, {2: 5}))
    discard_folder(run.pairs(2))
    train(run, _config(tmp_path, tiny_llama, precision="bf16"), WritesPairs.remote(run))
    # bf16 rounds weights and activations to 8 bits; what must agree is the course of the run.
    for ours, theirs in zip(_metrics(run), _metrics(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05), ours["step"]
    assert {weight.dtype for weight in _weights(run, 2).values()} == {torch.bfloat16}


def test_sft_learns_without_negatives(tiny_gemma, tmp_path):
    run = _train(tmp_path, tiny_gemma, method="sft", epochs=1, learning_rate=5e-3)
    lines = _metrics(run)
    assert all(line["loss"] == pytest.approx(line["nll"]) for line in lines)
    assert all("margin" not in line for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert AutoModelForCausalLM.from_pretrained(str(run.checkpoint(1))).config.model_type == (
        "gemma3_text"
    )


PREFERENCES = {
    "dadpo with KL": {"method": "dadpo", "kl_weight": 0.2},
    "kto": {"method": "kto"},
}


@pytest.mark.parametrize("training", PREFERENCES.values(), ids=PREFERENCES)
def test_preferences_are_learned_alike_by_one_worker_and_by_two(training, tiny_llama, tmp_path):
    both = []
    for layout in ({}, {"workers": 2, "micro_batch": 1, "zero_stage": 2}):
        run = RunFolder(UPath(tmp_path / str(len(both))))
        settings = training | {"epochs": 1, "global_batch": 4} | layout
        publish_pairs(run, 1)
        _publish_scores(run, _config(run.root, tiny_llama, **settings))
        both.append(_metrics(_train(run.root, tiny_llama, **settings)))
    for one, two in zip(*both, strict=True):
        shared = one.keys() - {"tokens_per_second", "padding"}
        assert {n: two[n] for n in shared} == pytest.approx({n: one[n] for n in shared}, abs=1e-5)
    assert ("kl" in one) == ("kl_weight" in training)
    assert both[0][-1]["preference"] < both[0][0]["preference"]


def test_a_lora_checkpoint_is_merged_into_an_ordinary_model(tiny_llama, tmp_path):
    run = _train(tmp_path, tiny_llama, lora={"rank": 8, "alpha": 64}, learning_rate=3e-2, epochs=3)
    lines = _metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not any("lora" in name for name in _weights(run, 3))
    # The merged weights carry on exactly where training saw the adapters: epoch 3's first loss is
    # that of checkpoint 2 on epoch 3's first batch.
    assert _first_loss(run, tiny_llama, 3) == pytest.approx(lines[6]["loss"], abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    changed = {n for n, w in _weights(run, 3).items() if not torch.equal(w, base[n])}
    assert changed == {n for n in _weights(run, 3) if "_proj" in n}, "norms and embeddings stay"


def test_a_checkpoint_has_the_log_probabilities_that_training_saw(reference, tiny_llama):
    assert _first_loss(reference, tiny_llama, 2) == pytest.approx(
        _metrics(reference)[3]["loss"], abs=1e-5
    )


def _first_loss(run: RunFolder, model: Path, epoch: int) -> float:
    """The loss of an epoch's first batch under the checkpoint of the epoch before."""
    training = _config(Path(), model).training
    student = AutoModelForCausalLM.from_pretrained(str(run.checkpoint(epoch - 1)))
    chat = load_chat(model)
    first = global_batches(PAIRS, training.global_batch, seed=3, epoch=epoch)[0]
    pairs = [tokenize_pair(pair_of(n, epoch), chat, 1024, contrast=True) for n in first]
    counts = count_batch(pairs, score_prompt=False)
    batch = collate_pairs(pairs, chat.pad_id, share_prompts=False, score_prompt=False)
    with torch.no_grad():
        return Objective(training, counts).loss(ResponseLogProbs(student), batch)[0].item()


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_pairs(tiny_llama, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = RunFolder(UPath(tmp_path / "run"))
    publish_pairs(run, 1)
    config = _config(tmp_path / "run", broken, workers=2, micro_batch=1)
    with pytest.raises(RunError, match=r"step 1: .* not finite") as caught:
        train(run, config, WritesPairs.remote(run))
    first = global_batches(PAIRS, 4, seed=3, epoch=1)[0]
    assert set(re.findall(r"\bp\d+", str(caught.value))) == {f"p{n}" for n in first}, (
        "both workers'"
    )
    assert not is_published(run.checkpoint(1))
    assert not (run.root / "metrics.jsonl").exists()


def test_training_without_room_stops_and_says_so(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    run = RunFolder(UPath(tmp_path))
    config = _config(tmp_path, tiny_llama, cpus_per_worker=100)
    with pytest.raises(
        RunError, match=r"Asked for 1 x \{'CPU': 100.0\}; the cluster has .*add nodes"
    ):
        train(run, config, resampler=None)


def test_ctrl_c_in_training_is_an_interruption(tiny_llama, tmp_path):
    run, handler = RunFolder(UPath(tmp_path)), signal.getsignal(signal.SIGINT)
    publish_pairs(run, 1)

    def interrupt():
        while not is_published(run.checkpoint(1)):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(run, _config(tmp_path, tiny_llama), WritesPairs.remote(run, delay=60))
    assert signal.getsignal(signal.SIGINT) is handler


LONG = {"epochs": 1, "steps_per_epoch": 150}


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tmp_path_factory) -> RunFolder:
    """A run of one long epoch."""
    return _train(tmp_path_factory.mktemp("undisturbed"), tiny_llama, **LONG)


def _at_step(run: RunFolder, step: int, act: Callable[[], None]) -> threading.Thread:
    """Act as soon as a run has recorded a step."""

    def wait() -> None:
        while not run.metrics_file.exists() or len(_metrics(run)) < step:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def _assert_as_undisturbed(
    run: RunFolder, undisturbed: RunFolder, within: float = 1e-6
) -> list[int]:
    """Steps and losses are those of an undisturbed run; gives steps that were taken twice."""
    steps = [line["step"] for line in _metrics(run)]
    assert sorted(set(steps)) == list(range(1, 151))
    losses = {line["step"]: line["loss"] for line in _metrics(undisturbed)}
    assert {line["step"]: line["loss"] for line in _metrics(run)} == pytest.approx(
        losses, abs=within
    )
    _assert_same_weights(_weights(run, 1), _weights(undisturbed, 1), atol=within)
    return sorted({step for step in steps if steps.count(step) > 1})


@pytest.mark.fault
def test_sigterm_saves_in_the_midst_of_an_epoch(undisturbed, tiny_llama, tmp_path, capsys):
    run, config = RunFolder(UPath(tmp_path)), _config(tmp_path, tiny_llama, **LONG)
    publish_pairs(run, 1)
    _at_step(run, 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with watched_board() as board, pytest.raises(KeyboardInterrupt):
        train(run, config, None, board)
    assert "asked to stop: saving" in capsys.readouterr().out
    done = len(_metrics(run))
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
    config = _config(tmp_path, tiny_llama, zero_stage=1, **ELASTIC)
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
    config = _config(tmp_path, tiny_llama, save_minutes=0.01, zero_stage=2, **ELASTIC)
    publish_pairs(run, 1)
    others = []

    def lose_one() -> None:
        others.append(Holds.remote())  # takes the place of the one that goes
        _workers()[-1].kill()

    losing = _at_step(run, 40, lose_one)
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
    undisturbed, tiny_llama, tmp_path
):
    run = RunFolder(UPath(tmp_path))
    config = _config(tmp_path, tiny_llama, save_minutes=0.01, **LONG)
    publish_pairs(run, 1)

    def kill_worker() -> None:
        for process in _workers():
            process.kill()

    killing = _at_step(run, 40, kill_worker)
    train(run, config, None)
    assert not killing.is_alive()
    again = _assert_as_undisturbed(run, undisturbed)
    assert 1 not in again, "it did not begin anew"
    assert len(_metrics(run)) > 150 - 1
