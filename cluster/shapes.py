"""The shape of a model: the numbers that decide what memory it takes, read without its weights."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import BadInputError, remote_code_error
from cluster.headers import Shapes, count_values, weight_shapes

# What a config has where layers see a window, keep a state, or compress keys and values.
_SMALL_CACHES = ("sliding_window", "layers_block_type", "kv_lora_rank")
# How most families, and GPT-2's, end the name of the embeddings of tokens.
_EMBEDDINGS = (".embed_tokens.weight", ".wte.weight")
# The norms of a model's first layer: Llama's input_layernorm, Qwen3's q_norm, GPT-2's ln_1.
_FIRST_NORMS = re.compile(r"\.0\..*?(\w*norm|ln_\w+)\.weight")


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that decide what it takes."""

    parameters: int
    layers: int
    hidden: int
    mlp: int  # width inside the MLP
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    context: int
    normalised: int = 0  # values of a token that a layer's norms take, if not twice `hidden`
    full_attention: bool = True  # False where some layer keeps less than two vectors a token

    @property
    def kv_values_per_token(self) -> int:
        """Values in the KV cache for one token."""
        return 2 * self.layers * self.key_value_heads * self.head_size


def read_shape(folder: Path, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a Hugging Face folder, from its config and the headers of its weights.

    Raises BadInputError where the config does not tell, is of a kind that transformers lacks, or of
    another model than the weights, and where weights are not whole.
    """
    config = _read_config(folder, trust_remote_code)
    weights = weight_shapes(folder)
    try:
        heads, hidden = config.num_attention_heads, config.hidden_size
        layers, vocabulary = config.num_hidden_layers, config.vocab_size
    except AttributeError as error:
        raise _unreadable(folder, error) from None
    _check_vocabulary(folder, vocabulary, weights)
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    return ModelShape(
        parameters=count_values(weights),
        layers=layers,
        hidden=hidden,
        mlp=getattr(config, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=head_size,
        vocabulary=vocabulary,
        context=getattr(config, "max_position_embeddings", 0),
        normalised=_normalised(weights, heads * head_size, key_value_heads * head_size),
        full_attention=_has_full_attention(config),
    )


def _normalised(weights: Shapes, queries: int, keys: int) -> int:
    """Values that the norms of a layer take; those of queries and keys have one weight a head."""
    of_heads = {"q_norm": queries, "k_norm": keys}
    found = {name: _FIRST_NORMS.search(name) for name in weights}
    norms = {match[1]: weights[name][0] for name, match in found.items() if match}
    return sum(of_heads.get(name, width) for name, width in norms.items())


def _has_full_attention(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    small = any(getattr(config, name, None) for name in _SMALL_CACHES)
    return kinds <= {"full_attention"} and not small


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        # Families name these fields differently; transformers knows GPT-2's n_layer by our names.
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  # each family has checks and errors of its own
        if "trust_remote_code" in str(error):
            raise remote_code_error(folder) from None
        raise _unreadable(folder, error) from None
    if not trust_remote_code and type(whole) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unreadable(folder, f"model_type {whole.model_type!r} writes no text")
    return whole.get_text_config()


def _unreadable(folder: Path, error: object) -> BadInputError:
    return BadInputError(
        f"the shape of the model in {folder} cannot be read ({str(error).partition(chr(10))[0]}): "
        "expected a causal language model whose config.json transformers can load"
    )


def _check_vocabulary(folder: Path, vocabulary: int, weights: Shapes) -> None:
    for name, shape in weights.items():
        if name.endswith(_EMBEDDINGS) and shape[0] != vocabulary:
            raise BadInputError(
                f"{folder}: config.json says vocab_size={vocabulary}, and the weights have "
                f"{shape[0]} rows in {name}: bring both from one model"
            )
