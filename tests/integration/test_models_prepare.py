"""The packaged models, really dequantised, in a process of their own so that its screen is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.chat import load_chat
from pipeline.models import resolve_model

pytestmark = pytest.mark.integration
PROJECT = Path(__file__).parents[2]
SUNRISE = "The sun rises in the east and"
TEMPLATE = PROJECT / "configs/templates/gemma.jinja"
PREPARE = "import sys; from pipeline.models import prepare_model; prepare_model(sys.argv[1])"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def prepare(name, cache):
    finished = subprocess.run(
        [sys.executable, "-c", PREPARE, name],
        env={**os.environ, "POTSTILL_CACHE": str(cache)},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return finished.stdout.splitlines(), finished.stderr, cache / "models" / name


def greedy(folder, token_ids, count):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    output = model.generate(torch.tensor([token_ids]), max_new_tokens=count, do_sample=False)
    return output[0][len(token_ids) :].tolist()


def settings_of(folder):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    return json.loads((folder / "generation_config.json").read_text())


def test_smollm2_is_prepared_quietly_and_answers(cache):
    screen, noise, folder = prepare("smollm2-135m-instruct", cache)
    assert [line.split()[0] for line in screen] == ["Preparing", "licence:", "ready"]
    assert noise == ""
    assert settings_of(folder)["eos_token_id"] == [2]
    assert resolve_model("smollm2-135m-instruct", cache) == folder

    chat = load_chat(folder, None)
    prompt = chat.prompt_ids("What is 2 + 3?", [("What is 1 + 1?", "1 + 1 = 2.")])
    answer = greedy(folder, prompt, 30)
    assert chat.tokenizer.decode(answer).startswith("2 + 3 = 5.")
    assert answer[-1] == chat.end_of_turn_id == 2


def test_gemma_is_prepared_with_the_bos_that_it_needs(cache):
    screen, noise, folder = prepare("gemma-3-270m", cache)
    assert "Gemma Terms of Use" in screen[1]
    assert noise == ""
    assert "Gemma Terms of Use" in (folder / "README.md").read_text()
    assert settings_of(folder)["eos_token_id"] == [1, 106]

    chat = load_chat(folder, TEMPLATE.read_text())
    plain = chat.tokenizer(SUNRISE)["input_ids"]
    assert plain[0] == chat.tokenizer.bos_token_id
    assert chat.tokenizer.decode(greedy(folder, plain, 6)).startswith(" sets in the west.")


def test_gemmas_template_writes_its_turns_with_one_bos(cache):
    _, _, folder = prepare("gemma-3-270m", cache)
    chat = load_chat(folder, TEMPLATE.read_text())
    prompt = chat.prompt_ids("Hello", [("One?", "Yes.")])
    assert chat.tokenizer.decode(prompt) == (
        "<bos><start_of_turn>user\nOne?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
        "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    )
    assert prompt[:2] == [2, 105]
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id) == "<end_of_turn>"
