"""The stages of a run, with what each takes of the cluster, how long, and for what money."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from cluster.nodes import Demand, counted, place
from cluster.sections import Nodes
from cluster.speed import LONGEST, SHORTEST, Span, Work, hours_between
from pipeline.needs import Known, engines, largest_engine, served, trainers
from pipeline.work import (
    asks_engines_while_training,
    evaluated,
    local_teachers,
    sampled,
    scored,
    student_rounds,
    trained,
)


@dataclass(frozen=True)
class Stage:
    """Processes that work on the same thing."""

    name: str
    demand: Demand
    work: Callable[[float], Work]
    """What there is to do where traces have this share of their most tokens."""
    beside: Demand | None = None
    """What is up meanwhile."""


def stages_of(known: Known) -> list[Stage]:
    """The stages in their order, without those that have nothing to do."""
    found = [*_sampling(known), *_training(known), _evaluation(known)]
    return [stage for stage in found if stage.work(LONGEST).tokens]


def _sampling(known: Known) -> Iterator[Stage]:
    config, sizes, most = known.config, known.sizes, known.config.engines.max_engines
    if not config.training.epochs:
        return
    for name in local_teachers(config):
        size = known.parameters[name]
        yield Stage(
            f"sample the {name}",
            engines(known, name, most),
            lambda share, size=size: sampled(config, sizes, size, share),  # type: ignore[misc]
        )
    rounds = student_rounds(config)
    size = known.parameters["student"]

    def all_rounds(share: float) -> Work:
        return sum((sampled(config, sizes, size, share) for _ in range(rounds)), Work())

    yield Stage(f"sample students, {rounds} x", engines(known, "student", most), all_rounds)


def _training(known: Known) -> Iterator[Stage]:
    config, sizes, parameters = known.config, known.sizes, known.parameters
    if not config.training.epochs:
        return
    if config.scored_by:
        names = ["teacher" if each == "teacher" else "student" for each in config.scored_by]
        demand = largest_engine(known, names, config.engines.max_engines)
        yield Stage("score", demand, lambda share: scored(config, sizes, parameters, share))
    kept = config.engines.between_epochs == "keep" or asks_engines_while_training(config)
    warm = engines(known, "student", config.engines.min_engines) if kept else None
    size = parameters["student"]
    yield Stage("train", trainers(known), lambda share: trained(config, sizes, size, share), warm)


def _evaluation(known: Known) -> Stage:
    config = known.config
    if config.evaluation.through == "endpoint":
        demand = served(known)
    else:
        demand = largest_engine(known, list(known.models), config.engines.max_engines)
    return Stage(
        "evaluate",
        demand,
        lambda share: evaluated(config, known.sizes, known.parameters, share),
    )


@dataclass(frozen=True)
class Costs:
    """How long a stage takes, and for what money; None where that is not known."""

    hours: Span | None
    money: Span | None


def costs_of(stage: Stage, known: Known) -> Costs:
    """Hours of a stage on the nodes that it finds room on, and the price of these."""
    fitting = _most_that_fit(stage, known)
    if not fitting:
        return Costs(None, None)
    devices = _devices(fitting, known)
    if not devices:
        return Costs(None, None)
    decoding, training = hours_between(stage.work, known.on_gpu)
    hours = (decoding + training).times(1 / devices)
    price = _price_per_hour([fitting, *filter(None, [stage.beside])], known.nodes)
    return Costs(hours, None if price is None else hours.times(price))


def _most_that_fit(stage: Stage, known: Known) -> Demand | None:
    """As many of the stage's processes as find room; all where the nodes are not known."""
    if not known.nodes:
        return stage.demand
    beside = [stage.beside] if stage.beside else []
    least = known.config.training.least_workers if stage.name == "train" else 1
    for count in range(stage.demand.count, least - 1, -1):
        demand = replace(stage.demand, count=count)
        if place([demand, *beside], known.nodes) is not None:
            return demand
    return None


def _devices(demand: Demand, known: Known) -> float:
    """GPUs that work, or cores of the nodes that are worked on, all of which a process takes."""
    if known.on_gpu:
        return demand.count * demand.gpus
    used = place([demand], known.nodes) or Counter()
    return sum(group.cpus * used[group.name] for group in known.nodes)


def _price_per_hour(demands: Sequence[Demand], nodes: Sequence[Nodes]) -> float | None:
    """The price of the nodes that are used, and of those that are up all the time."""
    used = place(demands, nodes) or Counter()
    up = {group: max(group.min_count, used[group.name]) for group in nodes}
    prices = [(group.price_per_hour, count) for group, count in up.items() if count]
    if not prices or any(price is None for price, _ in prices):
        return None
    return sum(price * count for price, count in prices if price is not None)


def stage_table(known: Known) -> Table:
    """The stages as a table for the terminal, a line each, and their sum."""
    priced = any(group.price_per_hour is not None for group in known.nodes)
    columns = ["stage", "processes", "each", "tokens", "hours", *["cost"] * priced]
    table = Table(*columns, box=None, pad_edge=False)
    found = [(stage, costs_of(stage, known)) for stage in stages_of(known)]
    for stage, costs in found:
        tokens = Span(stage.work(SHORTEST).tokens, stage.work(LONGEST).tokens)
        cells = [_processes(stage.demand, known), _each(stage.demand), _tokens(tokens)]
        cells += [_between(costs.hours, 2), *[_between(costs.money, 0)] * priced]
        table.add_row(stage.name, *cells)
    hours, money = (
        _total([getattr(costs, part) for _, costs in found]) for part in ("hours", "money")
    )
    table.add_row("all", "", "", "", _between(hours, 2), *[_between(money, 0)] * priced)
    return table


def _processes(demand: Demand, known: Known) -> str:
    most, least = counted(demand.count, demand.what), known.config.engines.min_engines
    varies = demand.what == "engine" and least < demand.count
    return f"{least} to {most}" if varies else most


def _each(demand: Demand) -> str:
    memory = demand.memory
    parts = [counted(demand.cpus, "CPU")] if demand.cpus else []
    if demand.gpus:
        parts.append(f"{counted(demand.gpus, 'GPU')} of {memory.gpu_gib:.1f} GiB")
    return ", ".join([*parts, f"{memory.host_gib:.1f} GiB"])


def _tokens(tokens: Span) -> str:
    unit, size = ("M", 1e6) if tokens.high >= 1e6 else ("k", 1e3)
    return f"{tokens.low / size:,.3g} to {tokens.high / size:,.3g} {unit}"


def _between(span: Span | None, digits: int) -> str:
    if span is None:
        return "?"
    return f"{span.low:,.{digits}f} to {span.high:,.{digits}f}"


def _total(spans: Sequence[Span | None]) -> Span | None:
    known = [span for span in spans if span is not None]
    return sum(known, Span(0, 0)) if known and len(known) == len(spans) else None
