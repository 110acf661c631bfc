"""What each stage of a run asks of the cluster: processes, their CPUs, GPUs and memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import RunConfig
from cluster.memory import GIB, Memory, engine_memory, trainer_memory
from cluster.nodes import Demand
from cluster.sections import Engines, Model, Nodes
from cluster.session import CPUS_PER_SERVED_MODEL, starts_own_cluster
from cluster.shapes import ModelShape
from pipeline.work import Parameters, Sizes, longest_batch

THIS_MACHINE = "this machine"


@dataclass(frozen=True)
class Known:
    """What a plan knows of a run: its models, its prompts, and the nodes that it works on."""

    config: RunConfig
    models: Mapping[str, tuple[Model, ModelShape]]
    """"student", and each teacher that this cluster runs."""
    sizes: Sizes
    nodes: tuple[Nodes, ...]
    """Empty where they are not known."""
    on_gpu: bool

    @property
    def parameters(self) -> Parameters:
        """Of each model."""
        return {name: shape.parameters for name, (_, shape) in self.models.items()}


def nodes_of(config: RunConfig) -> tuple[Nodes, ...]:
    """The nodes of the cluster that is joined, as far as `cluster.nodes` tells; or this machine."""
    import psutil

    if not starts_own_cluster(config):
        return config.cluster.nodes
    gpus, gpu_memory = _gpus_here() if config.cluster.accelerator != "cpu" else (0, None)
    here = Nodes(
        name=THIS_MACHINE,
        cpus=os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / GIB,
        gpus=gpus,
        gpu_memory_gib=gpu_memory,
    )
    return (here,)


def _gpus_here() -> tuple[int, float | None]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = [torch.cuda.get_device_properties(place).total_memory for place in range(count)]
    return count, min(memory) / GIB if memory else None


def runs_on_gpu(config: RunConfig, nodes: tuple[Nodes, ...]) -> bool | None:
    """Whether models will run on GPUs; None where that shows only once the nodes are there."""
    if config.cluster.accelerator == "auto":
        return any(group.gpus for group in nodes) if nodes else None
    return config.cluster.accelerator == "gpu"


def trainers(known: Known, count: int | None = None) -> Demand:
    """Training workers: all, or so many."""
    config, training = known.config, known.config.training
    teacher = None
    if training.kl_weight:
        section, shape = known.models["teacher"]
        teacher = shape, section.dtype
    batch = longest_batch(config, known.sizes)
    student = known.models["student"][1]
    return Demand(
        what="training worker",
        model="student",
        count=count or training.workers,
        cpus=_cpus(training.cpus_per_worker, config),
        gpus=int(known.on_gpu),
        memory=trainer_memory(student, training, batch, known.on_gpu, teacher),
        selector=config.cluster.training_nodes,
    )


def engines(known: Known, name: str, count: int) -> Demand:
    """So many sampling engines of a model."""
    config, options = known.config, known.config.engines
    section, shape = known.models[name]
    return Demand(
        what="engine",
        model=name,
        count=count,
        cpus=_cpus(options.cpus_per_engine * options.tensor_parallel, config),
        gpus=options.tensor_parallel * known.on_gpu,
        memory=engine_memory(shape, section.dtype, options, known.on_gpu),
        gpu_share=options.gpu_memory_share,
        selector=config.cluster.sampling_nodes,
        per_node=options.engines_per_node,
    )


def served(known: Known) -> Demand:
    """The models that answer an evaluation at once: one, which makes room for the next, or all."""
    config, serving = known.config, known.config.serving
    everything = serving.resident == "all"
    name = max(known.models, key=known.parameters.__getitem__)
    section, shape = known.models[name]
    options = Engines(
        kv_cache_gib=serving.kv_cache_gib,
        max_model_len=serving.max_model_len,
        tensor_parallel=max(1, round(serving.gpus_per_model)) if known.on_gpu else 1,
    )
    return Demand(
        what="served model",
        model=name,
        count=config.training.epochs + len(known.models) if everything else 1,
        cpus=_cpus(CPUS_PER_SERVED_MODEL, config),
        gpus=serving.gpus_per_model * known.on_gpu,
        memory=engine_memory(shape, section.dtype, options, known.on_gpu),
        gpu_share=options.gpu_memory_share * min(1, serving.gpus_per_model),
    )


def _cpus(held: float, config: RunConfig) -> float:
    # CPUs of a cluster of our own are logical, and counted elsewhere.
    return 0 if starts_own_cluster(config) else held


def largest_engine(known: Known, names: list[str], count: int) -> Demand:
    """The engines of that of these models which takes most."""
    found = [engines(known, name, count) for name in names]
    return max(found, key=lambda demand: demand.memory.gpu_gib + demand.memory.host_gib)


def parts_of(memory: Memory) -> str:
    """What takes memory, in words; GPUs' parts where there are any."""
    on_gpu = bool(memory.gpu)
    parts = memory.gpu if on_gpu else memory.host
    named = ", ".join(f"{name} {amount / GIB:.1f}" for name, amount in parts.items())
    if not on_gpu:
        return f"{memory.host_gib:.1f} GiB ({named})"
    return f"{memory.gpu_gib:.1f} GiB a GPU ({named}) and {memory.host_gib:.1f} GiB of its node"
