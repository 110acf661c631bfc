"""Shapes are read from a model folder, and those that ship are the models'."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from cluster.errors import BadInputError
from cluster.recipes import load_recipe
from cluster.shapes import read_shape
from evals.tables.spec import load_table
from pipeline.hub import known_shape

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = yaml.safe_load((CONFIGS.parent / "pipeline/hub_shapes.yaml").read_text())
TIED = {"Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"}
TIED |= {"meta-llama/Llama-3.2-1B-Instruct"}


@pytest.fixture
def shape(tiny_llama):
    return read_shape(tiny_llama)


def test_a_shape_is_that_of_the_model(shape, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert shape.parameters == model.num_parameters()
    config, layer = model.config, model.model.layers[0].self_attn
    assert (shape.layers, shape.hidden, shape.heads) == (2, 64, config.num_attention_heads)
    assert shape.mlp == model.model.layers[0].mlp.gate_proj.out_features
    assert shape.normalised == 2 * 64, "the two norms of a layer"
    keys_and_values = layer.k_proj.out_features + layer.v_proj.out_features
    assert shape.kv_values_per_token == 2 * keys_and_values


def test_norms_of_heads_take_every_head(tiny_gemma):
    shape, model = read_shape(tiny_gemma), AutoModelForCausalLM.from_pretrained(tiny_gemma)
    attention = model.model.layers[0].self_attn
    of_heads = attention.q_proj.out_features + attention.k_proj.out_features
    assert shape.normalised == 4 * shape.hidden + of_heads


def test_the_names_of_gpt2_are_known(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=128, vocab_size=50).save_pretrained(
        tmp_path
    )
    shape = read_shape(tmp_path)
    assert (shape.layers, shape.heads, shape.hidden, shape.head_size) == (3, 4, 64, 16)
    assert (shape.vocabulary, shape.context, shape.key_value_heads) == (50, 128, 4)
    assert shape.mlp == 256


@pytest.mark.parametrize(
    "config", ['{"model_type": "nobody-knows"}', "{}", '{"model_type": "vit"}']
)
def test_a_config_that_does_not_tell_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInputError, match="shape of the model in"):
        read_shape(tmp_path)


@pytest.mark.parametrize("hub_id", SHIPPED)
def test_a_shipped_shape_has_the_parameters_that_it_says(hub_id):
    shape = known_shape(hub_id)
    kind = Qwen2Config if "Qwen" in hub_id else LlamaConfig
    config = kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=hub_id in TIED,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == shape.parameters


def hub_models(config):
    sections = (config.student, config.base_student, *config.teachers.values())
    return {each.model for each in sections if each and "/" in each.model}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_hub_model_of_a_shipped_recipe_has_a_shape(path):
    in_table = path.parent.name == "tables"
    stages = (
        [stage for cell in load_table(path)[1] for stage in cell.stages]
        if in_table
        else load_recipe(path)
    )
    named = set().union(*map(hub_models, stages))
    elsewhere = {name for name in named if "://" in name or "checkpoints" in name}
    assert named - elsewhere <= SHIPPED.keys()
