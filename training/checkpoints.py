"""Checkpoints: the weights as an ordinary Hugging Face folder, with LoRA merged into them."""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.chat import Chat


def gather_weights(model: Any, keep: bool) -> dict[str, Tensor]:
    """The model's whole weights on the CPU, LoRA merged into them.

    Every worker calls this, as ZeRO-3 gathers one tensor at a time; those that do not `keep` get
    an empty dict.
    """
    import deepspeed

    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if "lora_" in name or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        layer = model.get_submodule(name.rpartition(".base_layer.")[0]) if _is_base(name) else None
        parts = [parameter, *_adapters(layer)]
        sharded = [part for part in parts if hasattr(part, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded):
            if keep:
                merged = _merged(parameter, layer) if name.endswith(".weight") else parameter
                weights[name.replace(".base_layer.", ".")] = merged.detach().cpu().clone()
    if keep:
        weights |= {n: b.detach().cpu().clone() for n, b in _kept_buffers(model)}
    return weights


def _is_base(name: str) -> bool:
    return ".base_layer." in name


def _adapters(layer: nn.Module | None) -> list[nn.Parameter]:
    if layer is None:
        return []
    return [p for n, p in layer.named_parameters() if "lora_" in n]


def _merged(weight: nn.Parameter, layer: Any) -> Tensor:
    if layer is None:
        return weight
    with torch.no_grad():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = (up.float() @ down.float()) * layer.scaling["default"]
        return (weight.float() + update).to(weight.dtype)


def _kept_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    state = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in state]


def write_checkpoint(
    folder: Path,
    base: Path,
    weights: dict[str, Tensor],
    chat: Chat,
    trust_remote_code: bool = False,
) -> None:
    """Write a Hugging Face folder: weights, config, tokenizer, chat template, generation config.

    `base` is the student's folder before training; with `trust_remote_code` save_pretrained copies
    the code that came with it. The generation config stops at the end-of-turn token, also where
    the base model's did not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    config.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, trust_remote_code=trust_remote_code
        )
    model.generation_config = _generation_config(base, chat)
    model.save_pretrained(folder, state_dict=weights)
    chat.tokenizer.chat_template = chat.template
    chat.tokenizer.save_pretrained(folder)


def _generation_config(base: Path, chat: Chat) -> Any:
    from transformers import GenerationConfig

    has_own = (base / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(base) if has_own else GenerationConfig()
    stops = generation.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or ())
    generation.eos_token_id = list(dict.fromkeys([*stops, chat.end_of_turn_id]))
    return _savable(generation)


def _savable(generation: Any) -> Any:
    """The same as sampling, or the token ids alone, where transformers would refuse to save it.

    It loads more than it saves: Vicuna gives a temperature without do_sample.
    """
    from transformers import GenerationConfig

    sampling = copy(generation)
    sampling.do_sample = True
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = GenerationConfig(**{name: getattr(generation, name) for name in names})
    return next((one for one in (generation, sampling) if _is_valid(one)), ids)


def _is_valid(generation: Any) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True
