"""The plan of a run: what will run, on what, how much of it, and all that it would refuse."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from cluster import memory, sections
from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.run_folder import check_recipe
from cluster.sections import Model
from cluster.session import refuse_taken_port, refuse_too_few_cpus, starts_own_cluster
from cluster.storage import is_published, location
from pipeline.chat import Chat, check_chat, check_same_tokenizer, load_chat
from pipeline.foreign_plan import plan_foreign
from pipeline.models import resolve_model
from pipeline.pairs import draws_from_latest
from pipeline.rows import Prompt
from pipeline.tasks import load_prompts, user_message, worked_examples
from pipeline.tasks.task import SPLITS, Split
from pipeline.verdicts.choice import check_verdict, has_verdicts

_GIB = 1 << 30
_PROBED_PROMPTS = 256
# How Granite, Cohere and Falcon-H1 name a factor between their head and the softmax.
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
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


@dataclass(frozen=True)
class _Probe:
    """A model of the run, with the ids of the longest prompt that it will answer."""

    folder: Path
    shape: memory.ModelShape
    chat: Chat
    prompt_ids: list[int]

    @property
    def longest_prompt(self) -> int:
        return len(self.prompt_ids)


def plan_run(config: RunConfig) -> Plan:
    """Look at configuration, data, run folder and model folders; start no model."""
    plan = Plan()
    plan.rows.append(("on", _whereabouts(config)))
    folder = plan.check(lambda: check_recipe(config))
    if starts_own_cluster(config):
        plan.check(lambda: refuse_taken_port(config.serving.host, config.serving.port))
        plan.check(lambda: refuse_too_few_cpus(config))
    splits = plan.check(lambda: _load_splits(plan, config))
    if splits is None:
        return plan
    plan.check(
        lambda: check_verdict(config.task, [one for part in splits.values() for one in part])
    )
    probes = _probe_models(plan, config, splits)
    if student := probes.get("student"):
        plan.check(lambda: _check_training_length(config, student))
        if folder:  # else the store may be out of reach
            _plan_foreign_teachers(plan, config, splits, student.chat)
        if probes.keys() == _models(config).keys():
            if config.training.kl_weight:
                teacher = probes["teacher"]
                plan.check(lambda: check_same_tokenizer(teacher.chat, student.chat))
            _plan_models(plan, config, probes)
            _plan_work(plan, config, len(splits["train"]), probes)
    return plan


def _models(config: RunConfig) -> dict[str, Model]:
    """The models that this cluster runs: teachers without an endpoint, and the student."""
    local = {name: teacher for name, teacher in config.teachers.items() if not teacher.endpoint}
    return {**local, "student": _student(config)}


def _probe_models(
    plan: Plan, config: RunConfig, splits: dict[Split, list[Prompt]]
) -> dict[str, _Probe]:
    probes = {
        name: plan.check(partial(_probe, name, section, config, splits))
        for name, section in _models(config).items()
    }
    return {name: probe for name, probe in probes.items() if probe}


def _plan_foreign_teachers(
    plan: Plan, config: RunConfig, splits: dict[Split, list[Prompt]], chat: Chat
) -> None:
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


def _load_splits(plan: Plan, config: RunConfig) -> dict[Split, list[Prompt]]:
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


def _probe(
    name: str, section: Model, config: RunConfig, splits: dict[Split, list[Prompt]]
) -> _Probe:
    folder = resolve_model(section.model)
    shape = memory.read_shape(folder, section.trust_remote_code)
    if name == "student":
        _check_head(folder, section)
    chat = load_chat(folder, section.chat_template, section.trust_remote_code)
    shots = worked_examples(section, splits["train"][0].kind)
    trained = _longest_prompts(chat, splits["train"], shots)
    asked = _longest_prompts(chat, splits["validation"] + splits["test"], shots)
    check_chat(chat, trained[0])
    engines, serving = config.engines.max_model_len, config.serving.max_model_len
    new_tokens, share = config.sampling.max_new_tokens, config.sampling.max_error_share
    served = name in ("teacher", "student")  # not so the further teachers
    for part, context in (("engines", engines), ("serving", serving))[: 1 + served]:
        if shape.context and context > shape.context:
            raise BadInputError(
                f"{part}.max_model_len={context} is more than the {name}'s own context of "
                f"{shape.context}: lower it"
            )
    prompts = len(splits["train"])
    _check_room("engines", engines, trained, new_tokens, share * prompts)
    if served:
        prompts = len(splits["validation"]) + len(splits["test"])
        _check_room("serving", serving, asked, config.evaluation_tokens, share * prompts)
    # A longer prompt than the engines take gets no traces, and so never comes to training.
    taken = (ids for ids in trained if len(ids) + new_tokens <= engines)
    return _Probe(folder, shape, chat, next(taken, trained[0]))


def _check_head(folder: Path, section: Model) -> None:
    """Refuse to train what `pipeline.logprobs` would score at another temperature."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scales = {name: settings[name] for name in _SCALES if settings.get(name, 1) not in (1, None)}
    if scales:
        raise BadInputError(
            f"student.model={section.model} scales its logits ({scales}), which training does not "
            "do: take a student of another architecture"
        )


def _longest_prompts(
    chat: Chat, prompts: list[Prompt], shots: tuple[tuple[str, str], ...]
) -> list[list[int]]:
    """Ids of the prompts with the longest texts, longest first."""
    messages = sorted(map(user_message, prompts), key=len)[-_PROBED_PROMPTS:]
    return sorted((chat.prompt_ids(message, shots) for message in messages), key=len, reverse=True)


def _check_room(
    part: str, context: int, prompts: list[list[int]], new_tokens: int, allowed: float
) -> None:
    too_long = sum(len(ids) + new_tokens > context for ids in prompts)
    if too_long > allowed:
        raise BadInputError(
            f"a prompt of {len(prompts[0])} tokens and {new_tokens} new tokens do not fit in "
            f"{part}.max_model_len={context}: raise it or lower the new tokens (this holds for "
            f"{too_long} prompt(s), and sampling.max_error_share tolerates {int(allowed)})"
        )


def _check_training_length(config: RunConfig, student: _Probe) -> None:
    if student.longest_prompt >= config.training.max_length:
        raise BadInputError(
            f"a prompt of {student.longest_prompt} tokens leaves no room for a response in "
            f"training.max_length={config.training.max_length}: raise it"
        )


def _plan_models(plan: Plan, config: RunConfig, probes: dict[str, _Probe]) -> None:
    for name, probe in probes.items():
        engine = memory.engine_bytes(probe.shape, config.engines) / _GIB
        text = (
            f"{probe.folder.name}: {probe.shape.parameters / 1e6:.0f} M parameters, longest prompt "
            f"{probe.longest_prompt} tokens, {engine:.1f} GiB an engine"
        )
        plan.rows.append((name, text))
        plan.rendered.append((f"{name} reads", repr(probe.chat.tokenizer.decode(probe.prompt_ids))))
        plan.rendered.append(("as ids", " ".join(map(str, probe.prompt_ids))))


def _plan_work(plan: Plan, config: RunConfig, prompts: int, probes: dict[str, _Probe]) -> None:
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
    students = int(contrasts and config.pairs.negatives_from == "student") + refreshes
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
            f"{training.workers} worker(s) of about {worker:.1f} GiB",
        ),
        ("files", f"{training.epochs} checkpoints of {_checkpoint_gib(student):.2f} GiB"),
        ("time", f"roughly {seconds / 60:.0f} min of sampling and training, if traces are long"),
    ]


def _checkpoint_gib(student: _Probe) -> float:
    return 2 * student.shape.parameters / _GIB


def _seconds(
    config: RunConfig,
    traces: int,
    students: int,
    pairs: int,
    row_tokens: int,
    probes: dict[str, _Probe],
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


def describe_plan(plan: Plan, with_prompts: bool = False) -> Table:
    """The plan as a table for the terminal, below a rendered prompt of each model if asked."""
    table = Table(show_header=False, box=None)
    for name, value in (plan.rendered if with_prompts else []) + plan.rows:
        table.add_row(name, Text(value))
    return table
