"""What the memory of one machine without a GPU cannot hold, told before anything is started."""

from collections.abc import Mapping

from cluster import memory
from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.memory import ModelShape
from cluster.sections import Engines, Model, Serving
from cluster.session import starts_own_cluster

_GIB = 1 << 30


def check_room(config: RunConfig, models: Mapping[str, tuple[Model, ModelShape]]) -> None:
    """Raise BadInputError where an engine's cache holds no sequence, or the machine no engine.

    `models` are those of this cluster's engines by name. On a GPU vLLM divides the memory itself,
    and other machines are not known here.
    """
    if not starts_own_cluster(config) or not _on_cpu(config):
        return
    for name, (section, shape) in models.items():
        _check_cache("engines", config.engines, name, section, shape)
        if name in ("teacher", "student") and config.evaluation.through == "endpoint":
            _check_cache("serving", config.serving, name, section, shape)
    _check_engines(config, [shape for _, shape in models.values()])


def _on_cpu(config: RunConfig) -> bool:
    import torch

    wanted = config.cluster.accelerator
    return wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available())


def _check_cache(
    part: str, options: Engines | Serving, name: str, section: Model, shape: ModelShape
) -> None:
    width = 4 if section.dtype == "float32" else 2
    needed = width * shape.kv_values_per_token * options.max_model_len / _GIB
    if shape.full_attention and needed > options.kv_cache_gib:
        raise BadInputError(
            f"{part}.kv_cache_gib={options.kv_cache_gib:g} holds no sequence of {part}."
            f"max_model_len={options.max_model_len} of the {name}: raise it to {needed:.2g} or "
            f"more, or lower {part}.max_model_len"
        )


def _check_engines(config: RunConfig, shapes: list[ModelShape]) -> None:
    import psutil

    engines, there = config.engines, psutil.virtual_memory().total
    needed = engines.min_engines * max(memory.engine_bytes(each, engines) for each in shapes)
    if needed > there:
        raise BadInputError(
            f"engines.min_engines={engines.min_engines} with engines.kv_cache_gib="
            f"{engines.kv_cache_gib:g} take about {needed / _GIB:.1f} GiB, and this machine has "
            f"{there / _GIB:.1f} GiB: lower them, or take smaller models or a cluster"
        )
