"""Ray Train and DeepSpeed on tiny models: parity of layouts, methods, checkpoints, refusals."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from upath import UPath

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import RunError
from cluster.publishing import is_published
from cluster.run_folder import RunFolder
from pipeline.anchors import asked_of
from pipeline.chat import load_chat
from pipeline.logprobs import ResponseLogProbs
from pipeline.rows import Anchor, to_table
from tests.integration.pairs import PAIRS, WritesPairs, pair_of, publish_pairs
from tests.integration.trainings import (
    assert_same_weights,
    config_of,
    metrics_of,
    train_run,
    weights_of,
)
from training.batches import count_batch, global_batches, tokenize_pair
from training.objectives import Objective
from training.stage import train
from training.step import collate_pairs

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


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


# ZeRO-2 with two workers is below, in the preferences.
LAYOUTS = {
    "four micro-batches": {"micro_batch": 1},
    "two workers": {"workers": 2, "micro_batch": 1},
    "two workers, ZeRO-3, checkpointing": {
        "workers": 2,
        "micro_batch": 1,
        "zero_stage": 3,
        "gradient_checkpointing": True,
    },
    "checkpointing, offload": {
        "gradient_checkpointing": True,
        "zero_stage": 1,
        "offload": "optimizer",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_neither_losses_nor_weights(layout, reference, tiny_llama, tmp_path):
    run = train_run(tmp_path, tiny_llama, **LAYOUTS[layout])
    for ours, theirs in zip(metrics_of(run), metrics_of(reference), strict=True):
        for name in ("loss", "nll", "odds_ratio", "margin", "learning_rate", "chosen_logp"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (ours["step"], name)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert_same_weights(weights_of(run, 2), weights_of(reference, 2), atol=1e-5)


def test_the_loss_falls_and_a_line_is_recorded_for_each_step(reference):
    lines = metrics_of(reference)
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
    for name, tensor in weights_of(reference, 2).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=0, rtol=0)
    assert model.dtype == torch.float32
    assert reference.saved_steps() == []
    assert not list(reference.root.glob("*/.staging*/*"))


def test_sft_learns_without_negatives(tiny_gemma, tmp_path):
    run = train_run(tmp_path, tiny_gemma, method="sft", epochs=1, learning_rate=5e-3)
    lines = metrics_of(run)
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
        _publish_scores(run, config_of(run.root, tiny_llama, **settings))
        both.append(metrics_of(train_run(run.root, tiny_llama, **settings)))
    for one, two in zip(*both, strict=True):
        shared = one.keys() - {"tokens_per_second", "padding"}
        assert {n: two[n] for n in shared} == pytest.approx({n: one[n] for n in shared}, abs=1e-5)
    assert ("kl" in one) == ("kl_weight" in training)
    assert both[0][-1]["preference"] < both[0][0]["preference"]


def test_a_lora_checkpoint_is_merged_into_an_ordinary_model(tiny_llama, tmp_path):
    run = train_run(
        tmp_path, tiny_llama, lora={"rank": 8, "alpha": 64}, learning_rate=3e-2, epochs=3
    )
    lines = metrics_of(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not any("lora" in name for name in weights_of(run, 3))
    # The merged weights carry on exactly where training saw the adapters: epoch 3's first loss is
    # that of checkpoint 2 on epoch 3's first batch.
    assert _first_loss(run, tiny_llama, 3) == pytest.approx(lines[6]["loss"], abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    changed = {n for n, w in weights_of(run, 3).items() if not torch.equal(w, base[n])}
    assert changed == {n for n in weights_of(run, 3) if "_proj" in n}, "norms and embeddings stay"


def test_a_checkpoint_has_the_log_probabilities_that_training_saw(reference, tiny_llama):
    assert _first_loss(reference, tiny_llama, 2) == pytest.approx(
        metrics_of(reference)[3]["loss"], abs=1e-5
    )


def _first_loss(run: RunFolder, model: Path, epoch: int) -> float:
    """The loss of an epoch's first batch under the checkpoint of the epoch before."""
    training = config_of(Path(), model).training
    student = AutoModelForCausalLM.from_pretrained(str(run.checkpoint(epoch - 1)))
    chat = load_chat(model)
    first = global_batches(PAIRS, training.global_batch, seed=3, epoch=epoch)[0]
    pairs = [tokenize_pair(pair_of(n, epoch), chat, 1024, contrast=True) for n in first]
    counts = count_batch(pairs, score_prompt=False)
    batch = collate_pairs(pairs, chat.pad_id, share_prompts=False, score_prompt=False)
    with torch.no_grad():
        return Objective(training, counts).loss(ResponseLogProbs(student), batch)[0].item()


@pytest.mark.fault
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_pairs(tiny_llama, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = RunFolder(UPath(tmp_path / "run"))
    publish_pairs(run, 1)
    config = config_of(tmp_path / "run", broken, workers=2, micro_batch=1)
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
    config = config_of(tmp_path, tiny_llama, cpus_per_worker=100)
    with pytest.raises(
        RunError, match=r"Asked for 1 x \{'CPU': 100.0\}; the cluster has .*add nodes"
    ):
        train(run, config, resampler=None)
