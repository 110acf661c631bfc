"""InternLM2's layout made Llama's: InternLM2 is a Llama whose attention reads one fused matrix.

Its layout: the modelling code in its hub folders (model_type internlm2), arXiv:2403.17297 sec. 2.2.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.errors import BadInputError
from pipeline.chat import Chat
from pipeline.internlm2_tokenizer import convert_tokenizer
from pipeline.weights import rewrite_weights, weight_files

_NAMES = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)\.weight")
_SAME_IN_LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def convert_internlm2(source: Path, out: Path) -> None:
    """Write the InternLM2 model of folder `source` into `out` as a Llama, with its tokenizer.

    Raises BadInputError for what a Llama without bias cannot be, and for other tensors than
    InternLM2's.
    """
    config = llama_config(source)
    queries = config.num_attention_heads // config.num_key_value_heads

    def change(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        return llama_tensors(name, tensor, queries, config.head_dim)

    tokenizer = convert_tokenizer(source)
    found = rewrite_weights(weight_files(source), out, change)
    _check_complete(config, found, source)
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _generation_config(source, tokenizer).save_pretrained(out)


def llama_config(source: Path) -> Any:
    """The configuration of the Llama that is the same as the InternLM2 in folder `source`."""
    from transformers import LlamaConfig

    given = json.loads((source / "config.json").read_text())
    if given.get("bias", True):  # InternLM2's own default
        raise BadInputError(f"{source} has biases, bias: true, expected bias: false")
    # "dynamic" stretches the positions of texts beyond max_position_embeddings alone, and the
    # engines go no further than that: without it all that is left stays the same.
    scaling = given.get("rope_scaling")
    if scaling and scaling.get("type", scaling.get("rope_type")) != "dynamic":
        raise BadInputError(f"{source} has rope_scaling {scaling}, expected none or type dynamic")
    return LlamaConfig(
        **{key: given[key] for key in _SAME_IN_LLAMA if key in given},
        rope_parameters={"rope_type": "default", "rope_theta": given.get("rope_theta", 10000.0)},
        architectures=["LlamaForCausalLM"],
        dtype=given.get("torch_dtype", given.get("dtype")),
    )


def llama_tensors(
    name: str, tensor: Tensor, queries: int, head_dim: int
) -> Iterator[tuple[str, Tensor]]:
    """Llama's tensors, with their names, of a tensor of InternLM2.

    `wqkv` is [kv_heads * (queries + 2) * head_dim, hidden]: of each key-value head its `queries`
    query heads, then the key, then the value.
    """
    layer = _LAYER.fullmatch(name)
    if name in _NAMES:
        yield _NAMES[name], tensor
    elif layer and layer[2] in _LAYER_NAMES:
        yield f"{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight", tensor
    elif layer and layer[2] == "attention.wqkv":
        groups = tensor.unflatten(0, (-1, queries + 2, head_dim))
        parts = {"q": groups[:, :queries], "k": groups[:, -2], "v": groups[:, -1]}
        for part, heads in parts.items():
            own = heads.reshape(-1, tensor.shape[1])
            yield f"{layer[1]}.self_attn.{part}_proj.weight", own
    else:
        raise BadInputError(
            f"no Llama has a place for the tensor {name!r}: expected a plain InternLM2ForCausalLM"
        )


def _check_complete(config: Any, found: dict[str, Any], source: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        found = found | {"lm_head.weight": expected["lm_head.weight"]}
    if found != expected:
        wrong = sorted(dict(expected.items() ^ found.items()))[0]
        raise BadInputError(
            f"the weights of {source} do not fit its config.json: {wrong} is "
            f"{_shape(found, wrong)}, expected {_shape(expected, wrong)}: bring the folder whole"
        )


def _shape(shapes: dict[str, Any], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"


def _generation_config(source: Path, tokenizer: Any) -> Any:
    """The source's own, made to stop at the end of a turn as well as at the end of a text."""
    from transformers import GenerationConfig

    own = (source / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(source) if own else GenerationConfig()
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ends.add(Chat(tokenizer, tokenizer.chat_template).end_of_turn_id)
    generation.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    return generation
