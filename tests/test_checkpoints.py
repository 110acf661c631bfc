"""A checkpoint of a student that comes with its own code is a whole, loadable folder too."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.sections import Model
from pipeline.chat import load_chat
from pipeline.sampling import make_writer
from training.checkpoints import write_checkpoint

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .own_parts import HALF

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **options):
        outputs = super().forward(*args, **options)
        outputs.logits = outputs.logits * HALF
        return outputs
"""


@pytest.fixture
def own_model(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "own_model"
    shutil.copytree(tiny_llama, folder)
    (folder / "own_code.py").write_text(CODE)
    (folder / "own_parts.py").write_text("HALF = 0.5\n")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_student_with_its_own_code_is_saved_with_it(own_model, tiny_llama, tmp_path):
    chat = load_chat(own_model, None, trust_remote_code=True)
    weights = load_file(own_model / "model.safetensors")
    target = tmp_path / "checkpoint"
    target.mkdir()
    write_checkpoint(target, own_model, weights, chat, trust_remote_code=True)
    assert {"own_code.py", "own_parts.py"} <= {file.name for file in target.iterdir()}
    shutil.rmtree(own_model)
    ids = torch.tensor([chat.prompt_ids("Tom has 3 pens.")])
    load = AutoModelForCausalLM.from_pretrained
    saved = load(target, trust_remote_code=True, dtype=torch.float32)
    assert type(saved).__name__ == "OwnModel"
    with torch.no_grad():
        expected = 0.5 * load(tiny_llama)(input_ids=ids).logits
        torch.testing.assert_close(saved(input_ids=ids).logits, expected)


def generation_config_of_checkpoint(model, tmp_path, settings):
    """What a student that came with these settings is saved with."""
    folder, target = tmp_path / "student", tmp_path / "checkpoint"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 0}))
    target.mkdir()
    chat = load_chat(folder)
    write_checkpoint(target, folder, load_file(folder / "model.safetensors"), chat)
    saved = json.loads((target / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, chat.end_of_turn_id]
    return saved


@pytest.mark.parametrize("settings", [{"temperature": 0.9, "top_p": 0.6}, {"top_k": 3}])
def test_sampling_options_without_do_sample_are_saved_with_it(tiny_llama, tmp_path, settings):
    saved = generation_config_of_checkpoint(tiny_llama, tmp_path, settings)
    assert saved | settings | {"do_sample": True} == saved


def test_generation_options_that_cannot_be_saved_are_left_out(tiny_llama, tmp_path):
    saved = generation_config_of_checkpoint(tiny_llama, tmp_path, {"length_penalty": 2.0})
    assert "length_penalty" not in saved


def test_a_checkpoint_loads_into_the_engine_of_a_base_model_from_the_hub(
    tiny_llama, tmp_path, config_of
):
    """Whose config.json was written by another version of transformers."""
    base, target = tmp_path / "hub", tmp_path / "checkpoint"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.35.0"}
    (base / "config.json").write_text(json.dumps(config))
    target.mkdir()
    write_checkpoint(target, base, load_file(base / "model.safetensors"), load_chat(base))

    def architecture(folder, **changed):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        section = Model(model=str(folder))
        return make_writer("", str(folder), section, config_of(), "number").weights.architecture

    assert architecture(base) == architecture(target)
    assert architecture(base) != architecture(target, rms_norm_eps=1e-3)
