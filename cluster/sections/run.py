"""Where a run lies, and the cluster that it works on."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from cluster.placement import check_labels, check_own_labels
from cluster.sections.base import (
    Execution,
    NonEmpty,
    NonNegativeFloat,
    Place,
    Section,
)

Labels = Annotated[str, AfterValidator(check_labels)]
OwnLabels = Annotated[str, AfterValidator(check_own_labels)]


class Run(Section):
    """The run itself."""

    folder: Execution[Place]
    """Where this run keeps its files: a path, or a URL such as s3://bucket/run."""
    store: Execution[Place] = "store"
    """Where samples are kept for every run to reuse: a path or a URL."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Seeds sampling, the drawing of pairs, and their order."""


class Nodes(Section):
    """Nodes of one kind, for the plan: what each has, and what it costs."""

    name: NonEmpty
    """What the plan calls them."""
    min_count: Annotated[int, Field(ge=0)] = 0
    """Nodes that are up, and paid for, whether anything runs on them or not."""
    max_count: PositiveInt = 1
    """Nodes at the most."""
    cpus: PositiveFloat
    """CPUs of a node."""
    memory_gib: PositiveFloat
    """Memory of a node."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of a node."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of each of its GPUs."""
    labels: OwnLabels | None = None
    """Labels of a node, such as stage=training,market=spot."""
    price_per_hour: NonNegativeFloat | None = None
    """What an hour of a node costs, in any currency; null leaves the cost untold."""


class Cluster(Section):
    """The Ray cluster that the run works on."""

    address: Execution[str | None] = None
    """The Ray cluster: null starts one on this machine, or joins that of RAY_ADDRESS, which a job
    has; "auto" joins the one around."""
    accelerator: Execution[Literal["auto", "cpu", "gpu"]] = "auto"
    """What models run on; auto takes GPUs where a node with one is up, so say gpu where nodes start
    on demand."""
    nodes: Execution[tuple[Nodes, ...]] = ()
    """The nodes of a cluster that is joined, so that `potstill plan` can tell hours, cost and what
    does not fit; nothing else reads it. A run on this machine is planned for this machine."""
    logical_cpus: Execution[PositiveInt | None] = None
    """Logical CPUs of the cluster that `address: null` starts; null makes room for
    engines, workers and served models, and means at least eight."""
    training_nodes: Execution[Labels | None] = None
    """Labels of the nodes that training workers may use, such as stage=training or market!=spot;
    null means any node. Needs a cluster that is joined, whose node groups have labels."""
    sampling_nodes: Execution[Labels | None] = None
    """The same for the engines that sample."""
