"""Estimates of the memory that a training worker and an engine take, part by part.

What is measured, and how near the estimates come: benchmarks/memory.md. Parts on a GPU follow from
the same code, and their constants are assumed, as nothing has been measured there yet.
"""

from dataclasses import dataclass, field

from cluster.sections import Dtype, Engines, Training
from cluster.shapes import ModelShape

GIB = 1 << 30
Parts = dict[str, float]  # bytes by the name of what takes them

# A process before it has a model: Python, torch, transformers, DeepSpeed, and Ray.
_TRAINER_PROCESS = 0.95e9
# The three processes of an engine: the replica, vLLM's core, and its worker, 0.6 to 0.75e9 each.
_ENGINE_PROCESSES = 1.95e9
_BATCHED_TOKENS = 8192  # that an engine takes through the model at once (pipeline.engine)
_SEQUENCES = 256  # that it samples at once: vLLM's limit
_GPU_PROCESS = 1e9  # CUDA's context, its libraries' workspaces, NCCL's buffers
_GPU_HOST_PROCESS = 4e9  # what a process that uses a GPU takes of the machine's memory
# glibc keeps freed blocks of less than 32 MiB, as those of activations are, so a heap has holes.
_HEAP = 1.4
# Arrays over the vocabulary that live at once for a scored token: its logits and their gradient.
_SCORES = 2
# And with a teacher: its logits, those of the student that are compared, and their gradient.
_COMPARED = 3
_WIDENED = 3 * 4  # bytes of a logit in the piece of them that is in float32 (pipeline.logprobs)
_LOGITS_AT_ONCE = 1 << 23
_LARGEST_BUCKET = 5e8  # DeepSpeed's reduce_bucket_size
_MOST_GATHERED = 1e9  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class Batch:
    """The longest micro-batch of a worker."""

    rows: int
    tokens: int
    """Of a row."""
    scored: int
    """Of a row's tokens, those whose log-probability is asked."""


@dataclass(frozen=True)
class Memory:
    """What one process, or one engine with its processes, takes."""

    host: Parts
    """Of the machine's memory."""
    gpu: Parts = field(default_factory=dict)
    """Of each of its GPUs."""

    @property
    def host_gib(self) -> float:
        """All of the machine's memory, in GiB."""
        return sum(self.host.values()) / GIB

    @property
    def gpu_gib(self) -> float:
        """All of a GPU's memory, in GiB."""
        return sum(self.gpu.values()) / GIB


def width_of(dtype: Dtype) -> int:
    """Bytes of a value."""
    return 4 if dtype == "float32" else 2


def engine_memory(shape: ModelShape, dtype: Dtype, engines: Engines, on_gpu: bool) -> Memory:
    """An engine. On a GPU the least that it must hold: its cache grows to gpu_memory_share."""
    width, shards = width_of(dtype), engines.tensor_parallel
    weights, batch = width * shape.parameters, _engine_batch(shape, width)
    if on_gpu:
        parts = {
            "weights": weights / shards,
            "KV cache": cache_bytes(shape, dtype, engines.max_model_len) / shards,
            "batch": batch / shards,
            "process": _GPU_PROCESS,
        }
        return Memory({"processes": _GPU_HOST_PROCESS}, parts)
    return Memory(
        {
            "weights": weights,
            # vLLM's layers keep a packed copy alone, but its head the plain one too, to embed with.
            "packed head": width * shape.vocabulary * shape.hidden,
            "KV cache": engines.kv_cache_gib * GIB,
            "batch": batch,
            "processes": _ENGINE_PROCESSES + (shards - 1) * _ENGINE_PROCESSES / 3,
        }
    )


def _engine_batch(shape: ModelShape, width: int) -> float:
    """What a prefill of one layer holds, and the sampler: logits, probabilities and noise."""
    prefill = width * _BATCHED_TOKENS * (3 * shape.mlp + 4 * shape.hidden)
    return prefill + 3 * 4 * shape.vocabulary * _SEQUENCES


def cache_bytes(shape: ModelShape, dtype: Dtype, tokens: int) -> float:
    """The KV cache of a sequence; less where layers see a window (`shape.full_attention`)."""
    return width_of(dtype) * shape.kv_values_per_token * tokens


def trainer_memory(
    shape: ModelShape,
    training: Training,
    batch: Batch,
    on_gpu: bool,
    teacher: tuple[ModelShape, Dtype] | None = None,
) -> Memory:
    """The peak of a training worker; `teacher` is loaded beside the student for token-level KL.

    The peak comes with the backward pass or with the optimizer's step, which follow each other.
    """
    held, moved = _states(shape, training)
    if teacher is not None:
        held["teacher"] = width_of(teacher[1]) * teacher[0].parameters
    step = _step(shape, training)
    passing = _passing(shape, training, batch, 1 if on_gpu else _HEAP)
    largest = passing if sum(passing.values()) > sum(step.values()) else step
    if not on_gpu:
        return Memory(held | moved | largest | {"process": _TRAINER_PROCESS})
    host: Parts = {"process": _GPU_HOST_PROCESS} | moved
    if training.offload != "none":  # Adam's step is taken where its moments are
        host, largest = host | step, passing
    return Memory(host, held | largest | {"process": _GPU_PROCESS})


def _states(shape: ModelShape, training: Training) -> tuple[Parts, Parts]:
    """What lives from step to step, each part shared by the fewest workers from its stage on.

    The second is what is offloaded.
    """
    trained = _trained(shape, training)
    parts = {
        "weights": _width(training) * shape.parameters / _shared_by(training, 3),
        "gradients": _width(training) * trained / _shared_by(training, 2),
        # Two moments in float32, and a copy of the weights beside those that are not plain float32.
        "optimizer": (8 if _is_plain(training) else 12) * trained / _shared_by(training, 1),
    }
    if training.zero_stage:
        parts["buckets"] = _width(training) * min(trained, _LARGEST_BUCKET)
    if training.zero_stage == 3 and training.least_workers > 1:
        parts["gathered weights"] = _width(training) * min(shape.parameters, _MOST_GATHERED)
    offloaded = {
        "none": [],
        "optimizer": ["optimizer"],
        "parameters": ["optimizer", "weights"],
    }[training.offload]
    moved = {name: parts.pop(name) for name in offloaded}
    return parts, moved


def _step(shape: ModelShape, training: Training) -> Parts:
    """What Adam's step takes: gradients in float32. It is fused, and makes no arrays beside."""
    trained = _trained(shape, training)
    # With ZeRO the worker's share is one flat tensor.
    copies = 4 * trained if training.zero_stage or not _is_plain(training) else 0
    return {"Adam's step": copies / _shared_by(training, 1)}


def _passing(shape: ModelShape, training: Training, batch: Batch, heap: float) -> Parts:
    """What a micro-batch keeps for its backward pass."""
    width, tokens = _width(training), batch.rows * batch.tokens
    layer = tokens * _values_kept(shape, width)
    if training.gradient_checkpointing:  # each layer's input, and one layer at a time
        kept = layer + shape.layers * width * shape.hidden * tokens
    else:
        kept = layer * shape.layers
    mask = width * batch.rows * batch.tokens**2  # one for all layers
    logits = shape.vocabulary * batch.rows * batch.scored
    arrays = _SCORES + (_COMPARED if training.kl_weight else 0)
    scores = arrays * width * logits + _WIDENED * min(logits, _LOGITS_AT_ONCE)
    return {"activations": heap * (kept + mask), "scores": scores}


def _values_kept(shape: ModelShape, width: int) -> int:
    """Bytes that a layer of a Llama keeps for each token, apart from its attention's mask.

    The norms' inputs in float32, what they divide by and give; queries, keys and values once for
    each head, and the attention's output twice; four vectors of the MLP: its gate before and after
    the activation, what it gates, and the product.
    """
    normalised = shape.normalised or 2 * shape.hidden
    attention = 5 * shape.heads * shape.head_size
    return (4 + 2 * width) * normalised + width * (attention + 4 * shape.mlp)


def _width(training: Training) -> int:
    return 2 if training.precision == "bf16" else 4


def _is_plain(training: Training) -> bool:
    return training.precision == "fp32" and training.zero_stage == 0


def _shared_by(training: Training, stage: int) -> int:
    return training.least_workers if training.zero_stage >= stage else 1


def _trained(shape: ModelShape, training: Training) -> int:
    if training.lora is None:
        return shape.parameters
    # Four linear layers of the attention's width and three of the MLP's.
    attention, mlp = shape.heads * shape.head_size, shape.mlp
    inputs_and_outputs = 4 * (shape.hidden + attention) + 3 * (shape.hidden + mlp)
    return shape.layers * training.lora.rank * inputs_and_outputs
