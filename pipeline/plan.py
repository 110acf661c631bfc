"""The plan of a run: what will run, on what, how much of it, and all that it would refuse."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from cluster import memory, sections
from cluster.config import RunConfig
from cluster.endpoint_key import refuse_open_endpoint
from cluster.errors import BadInputError
from cluster.lock import refuse_held
from cluster.publishing import is_published
from cluster.run_folder import check_recipe
from cluster.sections import Model
from cluster.session import (
    refuse_labels,
    refuse_taken_port,
    refuse_too_few_cpus,
    starts_own_cluster,
)
from cluster.storage import location
from pipeline.chat import Chat, check_same_tokenizer
from pipeline.foreign_plan import plan_foreign
from pipeline.pairs import draws_from_latest
from pipeline.probing import Probe, Splits, check_training_length, probe_model
from pipeline.room import check_room
from pipeline.tasks import load_prompts
from pipeline.tasks.task import SPLITS
from pipeline.verdicts.choice import check_verdict, has_verdicts

_GIB = 1 << 30
_IDS_AT_AN_END = 12
_ASSUMED_RIGHT = 0.5  # share of the teacher's traces, before any is sampled

Found = TypeVar("Found")


@dataclass
class Plan:
    """What a run would do. It may start where `refusals` is empty."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    rendered: list[tuple[str, str]] = field(default_factory=list)

    def check(self, step: Callable[[], Found]) -> Found | None:
        """Take a step of planning; a mistake that it finds becomes a refusal."""
        try:
            return step()
        except BadInputError as error:
            if str(error) not in self.refusals:
                self.refusals.append(str(error))
            return None


def plan_run(config: RunConfig) -> Plan:
    """Look at configuration, data, run folder and model folders; start no model."""
    plan = Plan()
    plan.rows.append(("on", _whereabouts(config)))
    plan.rows += [
        ("code", f"{model} brings code of its own, which RUNS ({option}.trust_remote_code)")
        for option, model in config.trusted_code.items()
    ]
    folder = plan.check(lambda: check_recipe(config))
    plan.check(lambda: refuse_held(location(config.run.folder)))
    plan.check(lambda: refuse_open_endpoint(config.serving.host))
    if starts_own_cluster(config):
        plan.check(lambda: refuse_taken_port(config.serving.host, config.serving.port))
        plan.check(lambda: refuse_too_few_cpus(config))
        plan.check(lambda: refuse_labels(config))
    splits = plan.check(lambda: _load_splits(plan, config))
    if splits is None:
        return plan
    plan.check(
        lambda: check_verdict(config.task, [one for part in splits.values() for one in part])
    )
    plan.check(lambda: _check_negatives(config))
    probes = _probe_models(plan, config, splits)
    if student := probes.get("student"):
        plan.check(lambda: check_training_length(config, student))
        if folder:  # else the store may be out of reach
            _plan_foreign_teachers(plan, config, splits, student.chat)
        if probes.keys() == _models(config).keys():
            if config.training.kl_weight:
                teacher = probes["teacher"]
                plan.check(lambda: check_same_tokenizer(teacher.chat, student.chat))
            models = {name: (each, probes[name].shape) for name, each in _models(config).items()}
            plan.check(lambda: check_room(config, models))
            _plan_models(plan, config, probes)
            _plan_work(plan, config, len(splits["train"]), probes)
    return plan


def _check_negatives(config: RunConfig) -> None:
    if config.pairs.negatives_from == "teacher" and not has_verdicts(config.task):
        raise BadInputError(
            f"pairs.negatives_from=teacher needs wrong answers, and {config.task.name} has no "
            "verdicts: set task.verdict, or negatives_from to student"
        )


def _models(config: RunConfig) -> dict[str, Model]:
    """The models that this cluster runs: teachers without an endpoint, and the student."""
    local = {name: teacher for name, teacher in config.teachers.items() if not teacher.endpoint}
    return {**local, "student": _student(config)}


def _probe_models(plan: Plan, config: RunConfig, splits: Splits) -> dict[str, Probe]:
    probes = {
        name: plan.check(partial(probe_model, name, section, config, splits))
        for name, section in _models(config).items()
    }
    return {name: probe for name, probe in probes.items() if probe}


def _plan_foreign_teachers(plan: Plan, config: RunConfig, splits: Splits, chat: Chat) -> None:
    for name, teacher in config.teachers.items():
        if teacher.endpoint:
            plan.rows += plan.check(partial(plan_foreign, name, config, splits, chat)) or []


def _student(config: RunConfig) -> Model:
    """The student, or the one that an earlier stage will make it of, of the same shape."""
    earlier = config.base_student
    made = is_published(location(config.student.model)) if earlier else True
    return config.student if made or earlier is None else earlier


def _whereabouts(config: RunConfig) -> str:
    accelerator = {"auto": "GPUs where there are any", "cpu": "CPUs", "gpu": "GPUs"}
    if starts_own_cluster(config):
        place = f"a Ray cluster of its own on this machine, {os.cpu_count()} cores"
    else:
        place = f"the Ray cluster at {config.cluster.address or 'this job'}"
    folders = f"run in {config.run.folder}, samples in {config.run.store}"
    return f"{place}, with {accelerator[config.cluster.accelerator]}; {folders}"


def _load_splits(plan: Plan, config: RunConfig) -> Splits:
    splits = {split: load_prompts(config.task, split, config.run.seed) for split in SPLITS}
    sizes = ", ".join(f"{len(prompts)} {split}" for split, prompts in splits.items())
    plan.rows.append(("task", f"{config.task.name}: {sizes} prompts"))
    plan.rows.append(("verdict", _verdict(config)))
    return splits


def _verdict(config: RunConfig) -> str:
    match config.task.verdict:
        case sections.FunctionVerdict() as verdict:
            return f"by the function {verdict.function}"
        case sections.UnitTestsVerdict() as verdict:
            return f"by unit tests of at most {verdict.time_limit_s:g} CPU seconds"
        case sections.JudgeVerdict() as verdict:
            return f"by the judge {verdict.model} at {verdict.url}"
    if has_verdicts(config.task):
        return "by the answers of the data"
    return "none: each answer of the teacher is chosen, each of the student rejected"


def _plan_models(plan: Plan, config: RunConfig, probes: dict[str, Probe]) -> None:
    for name, probe in probes.items():
        engine = memory.engine_bytes(probe.shape, config.engines) / _GIB
        millions = probe.shape.parameters / 1e6
        size = f"{millions:,.0f} M" if millions >= 10 else f"{millions:.1f} M"
        text = (
            f"{probe.folder.name}: {size} parameters, longest prompt "
            f"{probe.longest_prompt} tokens, {engine:.1f} GiB an engine"
        )
        plan.rows.append((name, text))
        plan.rendered.append((f"{name} reads", repr(probe.chat.tokenizer.decode(probe.prompt_ids))))
        plan.rendered.append(("as ids", _ends(probe.prompt_ids)))


def _plan_work(plan: Plan, config: RunConfig, prompts: int, probes: dict[str, Probe]) -> None:
    student = probes["student"]
    training, samples = config.training, config.sampling.samples
    if training.epochs == 0:
        plan.rows.append(("training", "none: only base and teacher are evaluated"))
        return
    teachers = config.teachers.values()
    contrasts = config.contrasts
    refreshes = sum(
        contrasts and draws_from_latest(epoch, config.pairs.phi_in(epoch))
        for epoch in range(1, training.epochs + 1)
    )
    base = contrasts and config.pairs.negatives_from == "student"
    fresh = sum(
        base and config.pairs.base == "fresh" and config.pairs.phi_in(epoch) < 1
        for epoch in range(2, training.epochs + 1)
    )
    students = int(base) + fresh + refreshes
    traces = prompts * samples
    pooled = sum(min(samples, each.traces_per_prompt or samples) for each in teachers)
    per_prompt = min(pooled, config.pairs.positives_per_prompt or pooled)
    share = _ASSUMED_RIGHT if has_verdicts(config.task) else 1.0
    pairs = ceil(prompts * per_prompt * share)
    per_epoch = training.steps_per_epoch or ceil(pairs / training.global_batch)
    steps = training.epochs * per_epoch
    row_tokens = min(
        student.longest_prompt + 2 * config.sampling.max_new_tokens, 2 * training.max_length
    )
    worker = memory.training_bytes(student.shape, training, row_tokens) / _GIB
    seconds = _seconds(config, traces, students, pairs, row_tokens, probes)
    minutes = max(1, round(seconds / 60))
    taught = "the teacher" if len(teachers) == 1 else f"each of {len(teachers)} teachers"
    plan.rows += [
        ("sampling", f"{traces} traces of {taught}, {students} x {traces} of students"),
        *[("scoring", f"pairs of each epoch by {' and '.join(config.scored_by)}")]
        * bool(config.scored_by),
        ("engines", f"{config.engines.min_engines} to {config.engines.max_engines}"),
        (
            "training",
            f"{training.method}, {training.epochs} epochs, about {pairs} pairs and {steps} steps "
            f"in all (if {share:.0%} of the teacher's traces can be learned from), "
            f"{_workers(training)} worker(s) of about {worker:.1f} GiB",
        ),
        ("files", f"{training.epochs} checkpoints of {_checkpoint_gib(student):.2g} GiB"),
        ("time", f"roughly {minutes} min of sampling and training, if traces are long"),
    ]


def _workers(training: sections.Training) -> str:
    least = training.least_workers
    return f"{least} to {training.workers}" if least < training.workers else str(least)


def _checkpoint_gib(student: Probe) -> float:
    return 2 * student.shape.parameters / _GIB


def _seconds(
    config: RunConfig,
    traces: int,
    students: int,
    pairs: int,
    row_tokens: int,
    probes: dict[str, Probe],
) -> float:
    student = probes["student"].shape.parameters
    teachers = sum(probe.shape.parameters for probe in probes.values()) - student
    cores = os.cpu_count() or 1
    gpu = config.cluster.accelerator == "gpu"
    decoding = memory.GPU_DECODING if gpu else memory.CPU_CORE_DECODING * cores
    training = memory.GPU_TRAINING if gpu else memory.CPU_CORE_TRAINING * cores
    tokens = traces * config.sampling.max_new_tokens
    sampled = 2 * tokens * (teachers + students * student)
    trained = 6 * config.training.epochs * pairs * row_tokens * student
    workers = config.training.workers if gpu else 1
    engines = config.engines.max_engines if gpu else 1
    return sampled / (decoding * engines) + trained / (training * workers)


def _ends(ids: list[int]) -> str:
    """Ids, in the midst of many a gap: what goes wrong with templates is at the ends."""
    shown = [str(token) for token in ids]
    if len(shown) > 2 * _IDS_AT_AN_END:
        shown[_IDS_AT_AN_END:-_IDS_AT_AN_END] = ["..."]
    return " ".join(shown)


def describe_plan(plan: Plan, with_prompts: bool = False) -> Table:
    """The plan as a table for the terminal, below a rendered prompt of each model if asked."""
    table = Table(show_header=False, box=None)
    for name, value in (plan.rendered if with_prompts else []) + plan.rows:
        table.add_row(name, Text(value))
    return table
