"""Which models can be pruned, and what pruning a piece of one saves; read without its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import BadInputError
from cluster.headers import weight_shapes

# model_type of a config.json -> whether the engines take a head size apart from the number of
# heads. Without one they divide the hidden size by that number, so that no head can go.
ARCHITECTURES = {"llama": True, "qwen2": False, "gemma": True, "gemma2": True, "gemma3_text": True}


@dataclass(frozen=True)
class Prunable:
    """What a model has, and how many parameters pruning a piece of it saves.

    A *group* is a key-value head with the query heads that share it.
    """

    parameters: int  # all of the model's, tied ones counted once
    hidden_size: int
    groups: int  # of one layer
    queries: int  # query heads of one group
    group_parameters: int  # of one group, over all layers
    channels: int  # of one layer's MLP
    channel_parameters: int  # of one channel, over all layers
    prunes_heads: bool  # False where heads must stay as they are


def read_prunable(folder: Path, reference: str) -> Prunable:
    """What of the model in `folder` can be pruned; errors call it `reference`.

    Raises BadInputError for an architecture that is not supported, remote code, and weights that
    are quantised or not whole.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = _check_architecture(folder, reference)
    weight_shapes(folder)  # refuses what is not whole, before hours of work
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = model.get_decoder().layers
    attention, mlp = layers[0].self_attn, layers[0].mlp
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    in_groups = sum(_size(part) for part in inputs) + attention.o_proj.weight.numel()
    in_channels = _size(mlp.gate_proj) + _size(mlp.up_proj) + mlp.down_proj.weight.numel()
    groups, channels = config.num_key_value_heads, config.intermediate_size
    return Prunable(
        parameters=_size(model),
        hidden_size=config.hidden_size,
        groups=groups,
        queries=config.num_attention_heads // groups,
        group_parameters=len(layers) * in_groups // groups,
        channels=channels,
        channel_parameters=len(layers) * in_channels // channels,
        prunes_heads=ARCHITECTURES[model_type],
    )


def _check_architecture(folder: Path, reference: str) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = config.get("model_type")
    supported = f"expected a model_type of {', '.join(ARCHITECTURES)}"
    if "auto_map" in config:
        raise BadInputError(
            f"{reference} comes with code of its own, which pruning does not run: {supported}, "
            "without an auto_map"
        )
    if model_type not in ARCHITECTURES:
        raise BadInputError(f"{reference} is of model_type {model_type!r}: {supported}")
    if "quantization_config" in config:
        raise BadInputError(
            f"{reference} has quantised weights: prune the original and quantise the result"
        )
    return model_type


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
