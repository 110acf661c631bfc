"""Which changes of a run's options would make it fit, found by trying them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from cluster.config import RunConfig
from cluster.nodes import Demand, place
from pipeline.needs import Known

Options = Mapping[str, Any]  # dotted option -> value
_MOST_SHOWN = 4
_HALVINGS = 16


def of_trainers(config: RunConfig) -> list[Options]:
    """What makes training workers smaller or fewer, the fewest changes first."""
    training = config.training
    passing: list[Options] = [
        {},
        {"training.gradient_checkpointing": True},
        {"training.micro_batch": 1},
        {"training.gradient_checkpointing": True, "training.micro_batch": 1},
    ]
    states: list[Options] = [
        {},
        *({"training.zero_stage": stage} for stage in range(training.zero_stage + 1, 4)),
        {"training.zero_stage": max(2, training.zero_stage), "training.offload": "optimizer"},
        {"training.zero_stage": 3, "training.offload": "parameters"},
        {"training.lora": {"rank": 16}},
    ]
    both = [{**some, **others} for some in states for others in passing]
    fewer: list[Options] = [{"training.min_workers": 1}]
    fewer += _halved("training.workers", training.workers)
    return sorted([*both, *fewer], key=len)


def of_engines(config: RunConfig) -> list[Options]:
    """What makes engines smaller or fewer."""
    engines = config.engines
    return [
        {"engines.between_epochs": "release"},
        *_halved("engines.min_engines", engines.min_engines),
        *_halved("engines.kv_cache_gib", engines.kv_cache_gib),
        *({"engines.tensor_parallel": engines.tensor_parallel * times} for times in (2, 4, 8)),
        *_halved("engines.max_model_len", engines.max_model_len),
    ]


def of_serving(config: RunConfig) -> list[Options]:
    """What makes served models smaller or fewer."""
    serving = config.serving
    return [
        {"serving.resident": "best"},
        *_halved("serving.kv_cache_gib", serving.kv_cache_gib),
        *({"serving.gpus_per_model": max(1.0, times * serving.gpus_per_model)} for times in (2, 4)),
        *_halved("serving.max_model_len", serving.max_model_len),
        {"evaluation.through": "engines"},
    ]


def _halved(option: str, value: float) -> list[Options]:
    """Half, a quarter, and so on; whole numbers stay whole."""
    smaller = (value / 2**times for times in range(1, _HALVINGS))
    if isinstance(value, int):
        return [{option: int(each)} for each in smaller if each >= 1]
    return [{option: each} for each in smaller]


def ways_out(
    known: Known, demands: Callable[[Known], Sequence[Demand]], options: Iterable[Options]
) -> str:
    """A sentence on the options that would let the demands fit, or that none does by itself."""
    options = [each for each in options if not _is_set(known.config, each)]
    fitting: list[Options] = []
    for each in options:
        more_than_enough = any(fits.keys() <= each.keys() for fits in fitting)
        if not more_than_enough and _fits(known, demands, each):
            fitting.append(each)
    if fitting:
        shown = ", or with ".join(map(_in_words, fitting[:_MOST_SHOWN]))
        return f"It fits with {shown}; or with more or larger nodes"
    tried = dict.fromkeys(name for each in options for name in each)
    return (
        f"No change by itself makes it fit ({', '.join(tried)}): change several, or take smaller "
        "models, or more or larger nodes"
    )


def _fits(known: Known, demands: Callable[[Known], Sequence[Demand]], options: Options) -> bool:
    try:
        config = RunConfig.model_validate(_with(known.config.model_dump(), options))
    except ValidationError:
        return False
    changed = replace(known, config=config)
    return place(demands(changed), known.nodes) is not None


def _with(raw: dict[str, Any], options: Options) -> dict[str, Any]:
    for name, value in options.items():
        section, _, option = name.partition(".")
        raw[section][option] = value
    return raw


def _is_set(config: RunConfig, options: Options) -> bool:
    raw = config.model_dump()
    return _with(config.model_dump(), options) == raw


def _in_words(options: Options) -> str:
    return " and ".join(f"{name}={_text(value)}" for name, value in options.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {each}" for key, each in value.items()) + "}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
