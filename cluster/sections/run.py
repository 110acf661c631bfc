"""Where a run lies, and the cluster that it works on."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from cluster.placement import check_labels
from cluster.sections.base import (
    Execution,
    NonNegativeFloat,
    Place,
    Section,
)

Labels = Annotated[str, AfterValidator(check_labels)]


class Run(Section):
    """The run itself."""

    folder: Execution[Place]
    """Where this run keeps its files: a path, or a URL such as s3://bucket/run."""
    store: Execution[Place] = "store"
    """Where samples are kept for every run to reuse: a path or a URL."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Seeds sampling, the drawing of pairs, and their order."""


class Cluster(Section):
    """The Ray cluster that the run works on."""

    address: Execution[str | None] = None
    """The Ray cluster: null starts one on this machine, "auto" joins the one around a job."""
    accelerator: Execution[Literal["auto", "cpu", "gpu"]] = "auto"
    """What models run on; auto takes GPUs where a node with one is up, so say gpu where nodes start
    on demand."""
    gpu_hour_price: Execution[NonNegativeFloat | None] = None
    """What an hour of one GPU costs, in any currency; a table's plan then tells its cost."""
    logical_cpus: Execution[PositiveInt | None] = None
    """Logical CPUs of the cluster that `address: null` starts; null makes room for
    engines, workers and served models, and means at least eight."""
    training_nodes: Execution[Labels | None] = None
    """Labels of the nodes that training workers may use, such as stage=training or market!=spot;
    null means any node. Needs a cluster that is joined, whose node groups have labels."""
    sampling_nodes: Execution[Labels | None] = None
    """The same for the engines that sample."""
