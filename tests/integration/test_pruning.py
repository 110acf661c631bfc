"""`potstill models prune` makes a model that vLLM runs as transformers does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.vllm_scores import vllm_logprobs

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]
# Of the first two one of two key-value groups goes; of Qwen2 channels alone.
RATIOS = {"llama": 0.47, "gemma3": 0.47, "qwen2": 0.22}
TEXT = "Tom has 3 pens and buys 5 more. How many pens does he have now?"
ANSWER = r"He starts with 3 pens. 3 + 5 = 8. The answer is \boxed{8}."


def prune(folder, ratio, out, cache):
    """What the user sees."""
    command = [sys.executable, "potstill.py", "models", "prune", str(folder)]
    return subprocess.run(
        [*command, "--ratio", str(ratio), "--out", str(out)],
        cwd=PROJECT,
        env=os.environ | {"POTSTILL_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("family", RATIOS)
def test_vllm_runs_a_pruned_model_as_transformers_does(family, tiny_of, tmp_path):
    from transformers import AutoModelForCausalLM

    from pipeline.chat import load_chat

    out = tmp_path / "pruned"
    finished = prune(tiny_of(family), RATIOS[family], out, tmp_path / "cache")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = json.loads((out / "pruning.json").read_text())
    fewer = figures["key_value_heads_after"] < figures["key_value_heads_before"]
    assert fewer == (family != "qwen2")

    chat = load_chat(out)
    prompt, response = chat.prompt_ids(TEXT), chat.response_ids(ANSWER, finished=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
    ours = scores.gather(1, torch.tensor(response)[:, None])[:, 0]
    theirs = vllm_logprobs(out, prompt, response, tmp_path / "scores.json")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours.std() > 1e-3  # not the flat scores of a model that knows nothing


def test_the_screen_shows_what_was_pruned_and_nothing_else(tiny_of, tmp_path):
    finished = prune(tiny_of("llama"), 0.47, tmp_path / "out", tmp_path / "cache")
    starts = [
        f"{tiny_of('llama')}: ",
        "  query heads a layer: 4 -> 2",
        "  key-value heads a layer: 2 -> 1",
        "  MLP channels a layer: 128 -> 48",
        "weighing  10/10 (100 %)",
        "pruning  2/2 (100 %)",
        "parameters: ",
        "perplexity: ",
        "pruned in ",
    ]
    lines = finished.stdout.splitlines()
    lines = [line for line in lines if "  eta " not in line and "(0 %)" not in line]
    expected = list(zip(lines, starts, strict=True))
    assert [line for line, start in expected if not line.startswith(start)] == []
    assert finished.stderr == ""


@pytest.mark.parametrize(
    ("ratio", "message"), [(0.9, "error: ratio=0.9 "), (2, "error: ratio=2: ")]
)
def test_a_mistake_is_one_line_and_exit_code_2(ratio, message, tiny_of, tmp_path):
    finished = prune(tiny_of("llama"), ratio, tmp_path / "out", tmp_path / "cache")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith(message)
    assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
