"""Estimates of what a model takes: memory in an engine and in a trainer, and time to run it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import BadInputError, remote_code_error
from cluster.headers import Shapes, count_values, weight_shapes
from cluster.sections import Engines, Training

# Floating-point operations a second that a small model reaches, for rough times. CPU figures are
# a core's, measured with a 135M model in bf16; GPU figures are assumed, not yet measured.
CPU_CORE_TRAINING, CPU_CORE_DECODING = 1.1e11, 4.5e10
GPU_TRAINING, GPU_DECODING = 1.2e14, 4e13

_ENGINE_OVERHEAD = 1.3e9  # a process with torch and vLLM in it
_TRAINER_OVERHEAD = 0.9e9  # a process with torch and DeepSpeed in it
# Activations that a transformer layer keeps for its backward pass, in values of the hidden size a
# token: about 34 in Korthikanti et al. (arXiv:2205.05198), for 16-bit values and a 4x MLP.
_ACTIVATIONS_PER_LAYER = 17
# What a config has where layers see a window, keep a state, or compress keys and values.
_SMALL_CACHES = ("sliding_window", "layers_block_type", "kv_lora_rank")
# How most families, and GPT-2's, end the name of the embeddings of tokens.
_EMBEDDINGS = (".embed_tokens.weight", ".wte.weight")


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model folder that decide what it takes."""

    parameters: int
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    context: int
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
    return ModelShape(
        parameters=count_values(weights),
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or hidden // heads,
        vocabulary=vocabulary,
        context=getattr(config, "max_position_embeddings", 0),
        full_attention=_has_full_attention(config),
    )


def _has_full_attention(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    small = any(getattr(config, name, None) for name in _SMALL_CACHES)
    return kinds <= {"full_attention"} and not small


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        # Families name these fields differently; transformers knows GPT-2's n_layer by our names.
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, AttributeError, TypeError, OSError) as error:
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


def engine_bytes(shape: ModelShape, engines: Engines) -> float:
    """Memory of one sampling engine on a CPU, its process and its KV cache included."""
    return _ENGINE_OVERHEAD + 2 * shape.parameters + engines.kv_cache_gib * (1 << 30)


def training_bytes(shape: ModelShape, training: Training, row_tokens: int) -> float:
    """Memory of one training worker, with `row_tokens` in the longest row of a micro-batch.

    Parameters, gradients, and AdamW's float32 copy and moments, each shared by the workers (the
    fewest that there may be) from its ZeRO stage on; activations of one micro-batch and float32
    scores over the vocabulary.
    """
    size = 2 if training.precision == "bf16" else 4
    trained = shape.parameters if training.lora is None else _lora_parameters(shape, training)
    shared = [stage <= training.zero_stage for stage in (3, 2, 1)]
    states = (size * shape.parameters, size * trained, 12 * trained)
    total = _TRAINER_OVERHEAD + sum(
        amount / (training.least_workers if is_shared else 1)
        for amount, is_shared in zip(states, shared, strict=True)
    )
    tokens = training.micro_batch * row_tokens
    layers = 2 if training.gradient_checkpointing else shape.layers
    activations = size * _ACTIVATIONS_PER_LAYER * shape.hidden * layers * tokens
    scores = 3 * 4 * shape.vocabulary * tokens / 2  # about half of a row's tokens are scored
    return total + activations + scores


def _lora_parameters(shape: ModelShape, training: Training) -> int:
    assert training.lora is not None
    # Seven linear layers a block, each about hidden x 2 hidden.
    return 7 * shape.layers * training.lora.rank * 3 * shape.hidden
