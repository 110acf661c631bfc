"""The rows of a plan: where a run works, on what, and how much of it there is."""

import os

from cluster import sections
from cluster.config import RunConfig
from cluster.memory import GIB
from cluster.nodes import counted, describe
from cluster.sections import Model, Nodes
from cluster.session import starts_own_cluster
from cluster.shapes import ModelShape
from cluster.speed import caveat
from pipeline.needs import Known, engines, parts_of, trainers
from pipeline.probing import Probe
from pipeline.verdicts.choice import has_verdicts
from pipeline.work import count_pairs, count_steps, right_share, student_rounds

Rows = list[tuple[str, str]]


def whereabouts(config: RunConfig, nodes: tuple[Nodes, ...]) -> Rows:
    """Where the run works and lies, and whose code runs."""
    accelerator = {"auto": "GPUs where there are any", "cpu": "CPUs", "gpu": "GPUs"}
    if starts_own_cluster(config):
        place = f"a Ray cluster of its own on this machine, {os.cpu_count()} cores"
    else:
        place = f"the Ray cluster at {config.cluster.address or 'this job'}"
    folders = f"run in {config.run.folder}, samples in {config.run.store}"
    there = ", ".join(map(describe, nodes)) or (
        "not known: describe them in cluster.nodes to learn hours, cost and what does not fit"
    )
    return [
        ("on", f"{place}, with {accelerator[config.cluster.accelerator]}; {folders}"),
        ("nodes", there),
        *(
            ("code", f"{model} brings code of its own, which RUNS ({option}.trust_remote_code)")
            for option, model in config.trusted_code.items()
        ),
    ]


def verdict(config: RunConfig) -> str:
    """Who says what is right."""
    match config.task.verdict:
        case sections.FunctionVerdict() as chosen:
            return f"by the function {chosen.function}"
        case sections.UnitTestsVerdict() as chosen:
            return f"by unit tests of at most {chosen.time_limit_s:g} CPU seconds"
        case sections.JudgeVerdict() as chosen:
            return f"by the judge {chosen.model} at {chosen.url}"
    if has_verdicts(config.task):
        return "by the answers of the data"
    return "none: each answer of the teacher is chosen, each of the student rejected"


def model_row(name: str, section: Model, shape: ModelShape, probe: Probe | None) -> tuple[str, str]:
    """A model, and the longest prompt that it was seen to get."""
    millions = shape.parameters / 1e6
    size = f"{millions:,.0f} M" if millions >= 10 else f"{millions:.1f} M"
    if probe:
        return name, (
            f"{probe.folder.name}: {size} parameters, longest prompt {probe.longest_prompt} tokens"
        )
    return name, f"{section.model}: {size} parameters; its template and prompts are not seen"


def work_rows(known: Known) -> Rows:
    """What is sampled, trained and written, and the memory that it takes, part by part."""
    config, training = known.config, known.config.training
    if training.epochs == 0:
        return [("training", "none: only base and teacher are evaluated")]
    teachers = config.teachers
    traces = known.sizes.train * config.sampling.samples
    rounds = student_rounds(config)
    taught = "the teacher" if len(teachers) == 1 else f"each of {len(teachers)} teachers"
    pairs, steps = count_pairs(config, known.sizes), count_steps(config, known.sizes)
    checkpoint = 2 * known.parameters["student"] / GIB
    of_students = f", {rounds} x {traces} of students" if rounds else ""
    by = " and ".join(config.scored_by)
    unread = ", ".join(config.unread)
    return [
        ("sampling", f"{traces} traces of {taught}{of_students}"),
        *[("scoring", f"pairs of each epoch by {by}")] * bool(by),
        (
            "training",
            f"{training.method}, {counted(training.epochs, 'epoch')}, about {pairs} pairs and "
            f"{steps} steps over all of them (if {right_share(config):.0%} of the teacher's traces "
            "can be learned from)",
        ),
        *[("not read", f"{unread}: {training.method} has no use for them")] * bool(unread),
        ("files", f"{counted(training.epochs, 'checkpoint')} of {checkpoint:.2g} GiB"),
        ("worker", parts_of(trainers(known).memory)),
        *((f"{name}'s engine", _engine(known, name)) for name in known.models),
        ("hours", f"{caveat(known.on_gpu)}; what the store holds takes none"),
    ]


def _engine(known: Known, name: str) -> str:
    parts = parts_of(engines(known, name, 1).memory)
    if not known.on_gpu:
        return parts
    share = known.config.engines.gpu_memory_share
    return f"at least {parts}; its cache grows until {share:.0%} of the GPU is full"
