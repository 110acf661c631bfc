"""The golden run: 20 steps of a tiny seeded model; a refactor must reproduce its losses.

After an intended change: POTSTILL_WRITE_GOLDEN=1 pytest tests/test_golden.py, and commit the file
with the change.
"""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.sections import Training
from pipeline.chat import load_chat
from pipeline.logprobs import ResponseLogProbs
from pipeline.rows import Pair
from training.batches import count_batch, global_batches, micro_batches, tokenize_pair
from training.objectives import Objective
from training.schedule import count_steps, learning_rate
from training.step import accumulate, collate_pairs, describe_step

GOLDEN = Path(__file__).parent / "golden" / "orpo_20_steps.json"
PAIRS, EPOCHS, SEED = 28, 5, 11
TRAINING = Training(global_batch=8, micro_batch=4, learning_rate=5e-3, epochs=EPOCHS)


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


def _twenty_steps(folder: Path) -> list[dict[str, float]]:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=TRAINING.betas, weight_decay=0.0)
    chat = load_chat(folder)
    pairs = [tokenize_pair(_pair(n), chat, 128, contrast=True) for n in range(PAIRS)]
    total = EPOCHS * count_steps(PAIRS, TRAINING.global_batch)
    collator = partial(collate_pairs, pad_id=0, share_prompts=True, score_prompt=False)
    found: list[dict[str, float]] = []
    for epoch in range(1, EPOCHS + 1):
        for indices in global_batches(PAIRS, TRAINING.global_batch, SEED, epoch):
            batch = [pairs[index] for index in indices]
            objective = Objective(TRAINING, count_batch(batch, score_prompt=False))
            share = micro_batches(batch, TRAINING.micro_batch, workers=1, rank=0)
            totals = accumulate(
                ResponseLogProbs(model),
                share,
                objective,
                collator,
                lambda loss, _: loss.backward(),
            )
            rate = learning_rate(len(found) + 1, total, TRAINING.learning_rate, 0.1)
            optimizer.param_groups[0]["lr"] = rate
            torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            figures = describe_step(totals, objective)
            found.append({name: figures[name] for name in ("loss", "nll", "odds_ratio", "margin")})
    return found


def test_twenty_steps_reproduce_the_golden_losses(tiny_llama):
    found = _twenty_steps(tiny_llama)
    if os.environ.get("POTSTILL_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(found) == len(golden) == 20
    for step, (ours, theirs) in enumerate(zip(found, golden, strict=True), start=1):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), f"step {step}"
    assert golden[-1]["loss"] < 0.6 * golden[0]["loss"]
