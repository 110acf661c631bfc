"""The golden run: 20 steps of a tiny model in DeepSpeed; a refactor must reproduce its losses.

After an intended change: POTSTILL_WRITE_GOLDEN=1 pytest tests/integration/test_golden.py, and
commit the file with the change.
"""

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.chat import load_chat
from pipeline.rows import Pair
from tests.integration.trainings import config_of
from training.batches import global_batches, tokenize_pair
from training.schedule import count_steps
from training.stepping import Stepper, Workers

GOLDEN = Path(__file__).parents[1] / "golden" / "orpo_20_steps.json"
PAIRS, EPOCHS, SEED = 28, 5, 11
TRAINING = {"global_batch": 8, "learning_rate": 5e-3, "epochs": EPOCHS, "warmup_share": 0.1}


def _pair(n: int) -> Pair:
    return Pair(
        prompt_id=f"p{n}",
        prompt=f"Tom has {n} pens and buys {n % 5} more. How many pens does he have now?",
        chosen=f"He starts with {n} pens. {n} + {n % 5} = {n + n % 5}. \\boxed{{{n + n % 5}}}",
        rejected=None if n % 6 == 0 else f"The answer is {n * 3}.",
        chosen_model="t",
        chosen_epoch=0,
        rejected_model="s",
        rejected_epoch=0,
        rejected_fallback=False,
        chosen_finished=True,
        rejected_finished=n % 2 == 0,
    )


@pytest.fixture
def control(tmp_path):
    """The group of a single worker."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/place", rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def _twenty_steps(model: Path, folder: Path, control: dist.ProcessGroup) -> list[dict[str, float]]:
    config, chat = config_of(folder, model, **TRAINING), load_chat(model)
    stepper = Stepper(config, model, chat, Workers(0, 1, control))
    pairs = [tokenize_pair(_pair(n), chat, 128, contrast=True) for n in range(PAIRS)]
    total = EPOCHS * count_steps(PAIRS, config.training.global_batch)
    found: list[dict[str, float]] = []
    for epoch in range(1, EPOCHS + 1):
        for indices in global_batches(PAIRS, config.training.global_batch, SEED, epoch):
            batch = [pairs[index] for index in indices]
            _, figures = stepper.take(len(found) + 1, total, batch, None)
            found.append({name: figures[name] for name in ("loss", "nll", "odds_ratio", "margin")})
    return found


def test_twenty_steps_reproduce_the_golden_losses(tiny_llama, tmp_path, control, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    found = _twenty_steps(tiny_llama, tmp_path, control)
    if os.environ.get("POTSTILL_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(found) == len(golden) == 20
    for step, (ours, theirs) in enumerate(zip(found, golden, strict=True), start=1):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), f"step {step}"
    assert golden[-1]["loss"] < 0.6 * golden[0]["loss"]
