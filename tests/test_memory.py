"""Shapes are read from a model folder, and estimates move the way that the parts do."""

import pytest

from cluster.errors import BadInputError
from cluster.memory import engine_bytes, read_shape, training_bytes
from cluster.sections import Engines, Training


@pytest.fixture
def shape(tiny_llama):
    return read_shape(tiny_llama)


def test_a_shape_is_that_of_the_model(shape, tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert shape.parameters == model.num_parameters()
    config, layer = model.config, model.model.layers[0].self_attn
    assert (shape.layers, shape.hidden, shape.heads) == (2, 64, config.num_attention_heads)
    keys_and_values = layer.k_proj.out_features + layer.v_proj.out_features
    assert shape.kv_values_per_token == 2 * keys_and_values


def test_the_names_of_gpt2_are_known(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=128, vocab_size=50).save_pretrained(
        tmp_path
    )
    shape = read_shape(tmp_path)
    assert (shape.layers, shape.heads, shape.hidden, shape.head_size) == (3, 4, 64, 16)
    assert (shape.vocabulary, shape.context, shape.key_value_heads) == (50, 128, 4)


@pytest.mark.parametrize(
    "config", ['{"model_type": "nobody-knows"}', "{}", '{"model_type": "vit"}']
)
def test_a_config_that_does_not_tell_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInputError, match="shape of the model in"):
        read_shape(tmp_path)


def test_an_engine_holds_its_cache(shape):
    more = engine_bytes(shape, Engines(kv_cache_gib=3)) - engine_bytes(
        shape, Engines(kv_cache_gib=1)
    )
    assert more == 2 * (1 << 30)


@pytest.mark.parametrize(
    ("stage", "shared"), [(0, 0), (1, 12), (2, 14), (3, 16)], ids=lambda value: str(value)
)
def test_zero_shares_states_over_the_workers(shape, stage, shared):
    def needed(**options):
        return training_bytes(shape, Training(global_batch=8, **options), row_tokens=100)

    saved = needed(workers=2) - needed(workers=2, zero_stage=stage)
    assert saved == pytest.approx(shared * shape.parameters / 2)
    elastic = needed(workers=4, min_workers=2, zero_stage=stage)
    assert elastic == needed(workers=2, zero_stage=stage), "when the fewest share them"


def test_what_costs_less_is_estimated_lower(shape):
    plain = training_bytes(shape, Training(), 100)
    assert training_bytes(shape, Training(gradient_checkpointing=True, micro_batch=4), 100) <= plain
    assert training_bytes(shape, Training(lora={"rank": 2}), 100) < plain
    assert training_bytes(shape, Training(micro_batch=2), 100) < plain
    assert training_bytes(shape, Training(precision="fp32"), 100) > plain
