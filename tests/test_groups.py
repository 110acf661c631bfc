"""Pruning takes what does not matter, whole, and leaves the rest as it was."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.calibration import negative_log_likelihood
from training.groups import layers_of, prune_layer, weigh
from training.widths import Widths

HEADS = ["llama", "llama_unshared", "gemma", "gemma2", "gemma3"]
FAMILIES = [*HEADS, "qwen2"]
TEXTS = [[5, 9, 17, 33, 4, 210, 6, 81, 12, 40], [7, 300, 8, 2, 90, 91, 92]]
SIZE = 32  # channels of a head


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in TEXTS])


def prune(model, groups, channels):
    for layer, worth in zip(layers_of(model), weigh(model, TEXTS), strict=True):
        prune_layer(layer, Widths(groups, channels), worth)
    return model


def of_group(group, model):
    """The query channels of a key-value group."""
    width = SIZE * model.config.num_attention_heads // model.config.num_key_value_heads
    return slice(group * width, (group + 1) * width)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_do_nothing_go_and_the_model_stays_the_same(family, tiny_of):
    model = load(tiny_of(family))
    torch.manual_seed(1)
    kept = []
    for layer in layers_of(model):
        order = torch.randperm(128)
        layer.mlp.down_proj.weight.data[:, order[:50]] = 0
        kept.append((order[50:].sort().values, layer.mlp.gate_proj.weight.detach().clone()))
    expected = logits(model)
    prune(model, model.config.num_key_value_heads, 78)
    for layer, (channels, gate) in zip(layers_of(model), kept, strict=True):
        assert torch.equal(layer.mlp.gate_proj.weight, gate[channels])
        assert layer.mlp.up_proj.weight.shape[0] == layer.mlp.down_proj.weight.shape[1] == 78
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", HEADS)
def test_a_group_of_heads_that_does_nothing_goes_and_the_model_stays_the_same(family, tiny_of):
    model = load(tiny_of(family))
    idle = [1, 0]  # one of each layer
    keys = []
    for layer, group in zip(layers_of(model), idle, strict=True):
        layer.self_attn.o_proj.weight.data[:, of_group(group, model)] = 0
        keys.append(layer.self_attn.k_proj.weight.detach().clone())
    expected = logits(model)
    groups = model.config.num_key_value_heads
    prune(model, groups - 1, 128)
    for layer, group, weight in zip(layers_of(model), idle, keys, strict=True):
        rest = [weight[g * SIZE : (g + 1) * SIZE] for g in range(groups) if g != group]
        assert torch.equal(layer.self_attn.k_proj.weight, torch.cat(rest))
        queries = (groups - 1) * model.config.num_attention_heads // groups * SIZE
        assert layer.self_attn.q_proj.weight.shape[0] == queries
        assert layer.self_attn.o_proj.weight.shape[1] == queries
        assert layer.self_attn.k_proj.out_features == (groups - 1) * SIZE
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_a_group_is_worth_what_gates_on_its_heads_change(tiny_of):
    model = load(tiny_of("llama"))
    gates = [torch.ones(4, requires_grad=True) for _ in layers_of(model)]
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, gate=gate: (inputs[0] * gate.repeat_interleave(SIZE),)
        )
        for layer, gate in zip(layers_of(model), gates, strict=True)
    ]
    expected = torch.zeros(2, 4)
    for ids in TEXTS:
        found = torch.autograd.grad(negative_log_likelihood(model, ids), gates)
        expected += torch.stack(found).abs()
    for hook in hooks:
        hook.remove()
    worth = torch.stack(weigh(model, TEXTS))
    torch.testing.assert_close(worth, expected.view(2, 2, 2).sum(2), rtol=1e-4, atol=1e-6)
    assert (worth[:, 0] - worth[:, 1]).abs().min() > 1e-4  # groups differ, or nothing is shown


def test_channels_are_ranked_by_all_weights_of_their_group(tiny_of):
    model = load(tiny_of("llama_unshared"))
    mlp = layers_of(model)[0].mlp
    torch.manual_seed(1)
    for part in (mlp.gate_proj, mlp.up_proj):
        part.bias.data.normal_()  # they are made as zeros, which are worth nothing
    weigh(model, TEXTS)

    def parts(parameter):
        return (parameter * parameter.grad).abs().detach()

    worth = parts(mlp.gate_proj.weight).sum(1) + parts(mlp.up_proj.weight).sum(1)
    worth += parts(mlp.gate_proj.bias) + parts(mlp.up_proj.bias)
    worth += parts(mlp.down_proj.weight).sum(0)
    rows = mlp.up_proj.weight.detach()[worth.topk(48).indices.sort().values]
    prune_layer(layers_of(model)[0], Widths(4, 48), torch.ones(4))
    assert torch.equal(mlp.up_proj.weight, rows)


def test_the_gradients_of_channels_are_those_of_all_texts(tiny_of):
    model = load(tiny_of("qwen2"))
    sum(negative_log_likelihood(model, ids) for ids in TEXTS).backward()
    expected = layers_of(model)[1].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    weigh(model, TEXTS)
    found = layers_of(model)[1].mlp.up_proj.weight.grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
