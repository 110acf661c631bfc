"""What cannot fit a cluster or its memory, told before anything is started, and what would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.memory import GIB, cache_bytes
from cluster.nodes import Demand, counted, describe, place
from cluster.placement import matches
from cluster.refusals import refuse_one_disk
from cluster.sections import Engines, Nodes, Serving
from pipeline.needs import Known, engines, largest_engine, parts_of, served, trainers
from pipeline.ways_out import Options, of_engines, of_serving, of_trainers, ways_out
from pipeline.work import asks_engines_while_training


def check_folders(config: RunConfig, nodes: Sequence[Nodes]) -> None:
    """Raise BadInputError where the cluster has many nodes and the run is kept on one of them."""
    most = sum(group.max_count for group in nodes)
    if most > 1:
        refuse_one_disk(config, f"cluster.nodes has up to {most}")


def check_labels(config: RunConfig, nodes: Sequence[Nodes]) -> None:
    """Raise BadInputError where a stage's labels are on no group of nodes."""
    for option in ("training_nodes", "sampling_nodes"):
        selector = getattr(config.cluster, option)
        if nodes and not any(matches(selector, group.labels) for group in nodes):
            there = ", ".join(f"{group.name}: {group.labels or 'no labels'}" for group in nodes)
            raise BadInputError(
                f"cluster.{option}={selector!r} is on no group of cluster.nodes ({there}): correct "
                "one of the two"
            )


def check_caches(known: Known) -> None:
    """Raise BadInputError where an engine's cache on a CPU holds no sequence.

    On a GPU vLLM divides the memory itself.
    """
    config = known.config
    for name in known.models if not known.on_gpu else ():
        _check_cache("engines", config.engines, name, known)
        if name in ("teacher", "student") and config.evaluation.through == "endpoint":
            _check_cache("serving", config.serving, name, known)


def _check_cache(part: str, options: Engines | Serving, name: str, known: Known) -> None:
    section, shape = known.models[name]
    needed = cache_bytes(shape, section.dtype, options.max_model_len) / GIB
    if shape.full_attention and needed > options.kv_cache_gib:
        raise BadInputError(
            f"{part}.kv_cache_gib={options.kv_cache_gib:g} holds no sequence of {part}."
            f"max_model_len={options.max_model_len} of the {name}: raise it to {needed:.2g} or "
            f"more, or lower {part}.max_model_len"
        )


@dataclass(frozen=True)
class _Kind:
    """Processes that must find room at once, and what would make them smaller."""

    demands: Callable[[Known], list[Demand]]
    options: list[Options]


def misfits(known: Known) -> Iterator[str]:
    """What does not fit the nodes: each kind of process alone, and trainers beside engines."""
    if not known.nodes:
        return
    if known.on_gpu and not any(group.gpus for group in known.nodes):
        there = " and ".join(map(describe, known.nodes))
        yield (
            f"cluster.accelerator=gpu, but {there} has no GPU: join a cluster with GPUs "
            "(cluster.address, cluster.nodes), or set cluster.accelerator to cpu"
        )
        return
    alone = [kind for kind in _kinds(known) if place(kind.demands(known), known.nodes) is None]
    for kind in alone:
        yield _too_large(kind, known)
    both = _Kind(_beside_trainers, of_trainers(known.config) + of_engines(known.config))
    if not alone and place(both.demands(known), known.nodes) is None:
        yield _full(both, known)


def _kinds(known: Known) -> Iterator[_Kind]:
    config = known.config
    for name in known.models:
        yield _Kind(lambda k, n=name: [_least(k, n)], of_engines(config))  # type: ignore[misc]
    if config.evaluation.through == "endpoint":
        yield _Kind(lambda k: [served(k)], of_serving(config))
    if config.training.epochs:
        yield _Kind(lambda k: [_least_trainers(k)], of_trainers(config))


def _least(known: Known, name: str) -> Demand:
    return engines(known, name, known.config.engines.min_engines)


def _least_trainers(known: Known) -> Demand:
    return trainers(known, known.config.training.least_workers)


def _beside_trainers(known: Known) -> list[Demand]:
    """Trainers and the engines that are up meanwhile, where there are both."""
    config = known.config
    kept = config.engines.between_epochs == "keep"
    if not config.training.epochs or not (kept or asks_engines_while_training(config)):
        return []
    asked = {"student": True, "teacher": kept or "teacher" in config.scored_by}
    names = [name for name in known.models if asked.get(name, kept)]
    return [_least_trainers(known), largest_engine(known, names, config.engines.min_engines)]


def _too_large(kind: _Kind, known: Known) -> str:
    (demand,) = kind.demands(known)
    return (
        f"No room for {_in_words(demand)} on {_nodes_for(demand, known)}. "
        f"{ways_out(known, kind.demands, kind.options)}"
    )


def _full(kind: _Kind, known: Known) -> str:
    config, (workers, warm) = known.config, kind.demands(known)
    why = (
        "engines sample and score between epochs, while trainers hold their place whatever "
        "engines.between_epochs says"
        if asks_engines_while_training(config)
        else "engines stay warm beside trainers (engines.between_epochs=keep)"
    )
    return (
        f"No room for {_in_words(warm)} on {_nodes_for(warm, known)} beside {_in_words(workers)} "
        f"on {_nodes_for(workers, known)}: {why}. {ways_out(known, kind.demands, kind.options)}"
    )


def _in_words(demand: Demand) -> str:
    held = {"CPU": demand.cpus, "GPU": demand.gpus}
    each = [counted(count, noun) for noun, count in held.items() if count]
    what = f"{counted(demand.count, demand.what)} of the {demand.model}"
    return f"{what}, each with {', '.join([*each, parts_of(demand.memory)])},"


def _nodes_for(demand: Demand, known: Known) -> str:
    there = [group for group in known.nodes if matches(demand.selector, group.labels)]
    return " and ".join(map(describe, there))
