"""Nodes of a cluster, and whether the processes of a stage find room on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.memory import Memory
from cluster.placement import matches
from cluster.sections import Nodes

_MOST = 10_000  # nodes of a group that are looked at


@dataclass(frozen=True)
class Demand:
    """Processes of one kind, and what each asks of a node."""

    what: str
    model: str
    """Which it holds."""
    count: int
    cpus: float
    gpus: float
    memory: Memory
    gpu_share: float = 1.0
    """Of a GPU's memory, what may be taken."""
    selector: str | None = None
    """Labels that a node must have."""
    per_node: int | None = None
    """At the most."""


class _Node:
    """What is left of a node."""

    def __init__(self, group: Nodes) -> None:
        self.group = group
        self._cpus, self._gpus = group.cpus, float(group.gpus)
        self._memory, self._counts = group.memory_gib, Counter[str]()

    def take(self, demand: Demand) -> bool:
        """Make room for one of the processes, if there is any."""
        full = demand.per_node is not None and self._counts[demand.what] >= demand.per_node
        if full or not self._holds(demand):
            return False
        self._counts[demand.what] += 1
        self._cpus -= demand.cpus
        self._gpus -= demand.gpus
        self._memory -= demand.memory.host_gib
        return True

    def _holds(self, demand: Demand) -> bool:
        room = (self.group.gpu_memory_gib or 0) * demand.gpu_share
        return (
            matches(demand.selector, self.group.labels)
            and demand.cpus <= self._cpus
            and demand.gpus <= self._gpus
            and demand.memory.host_gib <= self._memory
            and (not demand.gpus or demand.memory.gpu_gib <= room)
        )


def place(demands: Sequence[Demand], groups: Sequence[Nodes]) -> Counter[str] | None:
    """Nodes of each group that all demands together take; None where they do not fit.

    Nodes are filled one after the other, in the order of `groups` and of `demands`, and where that
    fails in the other order of `demands`.
    """
    for order in (demands, demands[::-1]):
        nodes: list[_Node] = []
        if all(_take(demand, nodes, groups) for demand in order for _ in range(demand.count)):
            return Counter(node.group.name for node in nodes)
    return None


def _take(demand: Demand, nodes: list[_Node], groups: Sequence[Nodes]) -> bool:
    """Room on a node that is in use, or on the first of another one's group."""
    if any(node.take(demand) for node in nodes):
        return True
    used = Counter(node.group.name for node in nodes)
    for group in groups:
        fresh = _Node(group)
        if used[group.name] < min(group.max_count, _MOST) and fresh.take(demand):
            nodes.append(fresh)
            return True
    return False


def describe(group: Nodes) -> str:
    """A group of nodes in a few words."""
    has = [counted(group.cpus, "CPU")]
    if group.gpus:
        has.append(f"{counted(group.gpus, 'GPU')} of {group.gpu_memory_gib:g} GiB")
    count = f"{group.max_count} x " if group.max_count > 1 else ""
    return f"{count}{group.name} ({', '.join(has)}, {group.memory_gib:.4g} GiB)"


def counted(count: float, noun: str) -> str:
    """ "1 CPU", "2 CPUs"."""
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def impossible_nodes(groups: Sequence[Nodes]) -> list[str]:
    """What the groups of `cluster.nodes` may not say, a sentence each."""
    problems = []
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        problems.append(f"cluster.nodes has {', '.join(names)}: give each group its own name")
    for group in groups:
        if group.min_count > group.max_count:
            problems.append(
                f"cluster.nodes, {group.name}: min_count={group.min_count} is more than max_count="
                f"{group.max_count}: lower one or raise the other"
            )
        if bool(group.gpus) != bool(group.gpu_memory_gib):
            problems.append(
                f"cluster.nodes, {group.name}: gpus={group.gpus} with gpu_memory_gib="
                f"{group.gpu_memory_gib}: give both, or neither"
            )
    return problems
