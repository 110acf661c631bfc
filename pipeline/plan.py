"""The plan of a run: what will run, on what, how much of it, and all that it would refuse."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from cluster import memory
from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.run_folder import check_recipe
from cluster.sections import Model
from cluster.session import refuse_taken_port, refuse_too_few_cpus, starts_own_cluster
from pipeline.chat import Chat, check_chat, load_chat
from pipeline.models import resolve_model
from pipeline.pairs import draws_from_latest
from pipeline.rows import Prompt
from pipeline.tasks import instruct, load_prompts, user_message
from pipeline.tasks.task import SPLITS, Split

_GIB = 1 << 30
_PROBED_PROMPTS = 256
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
            self.refusals.append(str(error))
            return None


@dataclass(frozen=True)
class _Probe:
    """A model of the run, with the ids of the longest prompt that it will sample from."""

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
    plan.check(lambda: check_recipe(config))
    if starts_own_cluster(config):
        plan.check(lambda: refuse_taken_port(config.serving.host, config.serving.port))
        plan.check(lambda: refuse_too_few_cpus(config))
    splits = plan.check(lambda: _load_splits(plan, config))
    if splits is None:
        return plan
    teacher = plan.check(lambda: _probe("teacher", config.teacher, config, splits))
    student = plan.check(lambda: _probe("student", config.student, config, splits))
    if teacher and student:
        plan.check(lambda: _check_training_length(config, student))
        _plan_models(plan, config, teacher, student)
        _plan_work(plan, config, len(splits["train"]), teacher, student)
    return plan


def _load_splits(plan: Plan, config: RunConfig) -> dict[Split, list[Prompt]]:
    splits = {split: load_prompts(config.task, split, config.run.seed) for split in SPLITS}
    sizes = ", ".join(f"{len(prompts)} {split}" for split, prompts in splits.items())
    plan.rows.append(("task", f"{config.task.name}: {sizes} prompts"))
    return splits


def _probe(
    name: str, section: Model, config: RunConfig, splits: dict[Split, list[Prompt]]
) -> _Probe:
    folder = resolve_model(section.model)
    shape = memory.read_shape(folder, section.trust_remote_code)
    chat = load_chat(folder, section.chat_template, section.trust_remote_code)
    trained, asked = splits["train"], splits["validation"] + splits["test"]
    shots = tuple(
        (instruct(shot.question, trained[0].kind), shot.answer)
        for shot in getattr(section, "few_shot", ())
    )
    longest = _longest_prompt(chat, trained, shots)
    contexts = (
        ("engines", config.engines.max_model_len, longest, config.sampling.max_new_tokens),
        (
            "serving",
            config.serving.max_model_len,
            _longest_prompt(chat, asked, shots),
            config.evaluation_tokens,
        ),
    )
    for part, context, ids, new_tokens in contexts:
        if shape.context and context > shape.context:
            raise BadInputError(
                f"{part}.max_model_len={context} is more than the {name}'s own context of "
                f"{shape.context}: lower it"
            )
        check_chat(chat, ids, new_tokens, context, f"{part}.max_model_len")
    return _Probe(folder, shape, chat, longest)


def _longest_prompt(
    chat: Chat, prompts: list[Prompt], shots: tuple[tuple[str, str], ...]
) -> list[int]:
    """Ids of the longest prompt, as far as a look at some of them tells."""
    longest = max(prompts, key=lambda prompt: len(prompt.question))
    probed = [longest, *prompts[:_PROBED_PROMPTS]]
    return max((chat.prompt_ids(user_message(prompt), shots) for prompt in probed), key=len)


def _check_training_length(config: RunConfig, student: _Probe) -> None:
    if student.longest_prompt >= config.training.max_length:
        raise BadInputError(
            f"a prompt of {student.longest_prompt} tokens leaves no room for a response in "
            f"training.max_length={config.training.max_length}: raise it"
        )


def _plan_models(plan: Plan, config: RunConfig, teacher: _Probe, student: _Probe) -> None:
    for name, probe in (("teacher", teacher), ("student", student)):
        engine = memory.engine_bytes(probe.shape, config.engines) / _GIB
        text = (
            f"{probe.folder.name}: {probe.shape.parameters / 1e6:.0f} M parameters, longest prompt "
            f"{probe.longest_prompt} tokens, {engine:.1f} GiB an engine"
        )
        plan.rows.append((name, text))
        plan.rendered.append((f"{name} reads", repr(probe.chat.tokenizer.decode(probe.prompt_ids))))
        plan.rendered.append(("as ids", " ".join(map(str, probe.prompt_ids))))


def _plan_work(
    plan: Plan, config: RunConfig, prompts: int, teacher: _Probe, student: _Probe
) -> None:
    training, samples = config.training, config.sampling.samples
    contrasts = training.method == "orpo"
    refreshes = sum(
        contrasts and draws_from_latest(epoch, config.pairs.phi)
        for epoch in range(1, training.epochs + 1)
    )
    students = int(contrasts) + refreshes
    traces = prompts * samples
    per_prompt = min(samples, config.pairs.positives_per_prompt or samples)
    pairs = ceil(prompts * per_prompt * _ASSUMED_RIGHT)
    steps = training.epochs * ceil(pairs / training.global_batch)
    row_tokens = min(
        student.longest_prompt + 2 * config.sampling.max_new_tokens, 2 * training.max_length
    )
    worker = memory.training_bytes(student.shape, training, row_tokens) / _GIB
    seconds = _seconds(config, traces, students, pairs, row_tokens, teacher, student)
    plan.rows += [
        ("sampling", f"{traces} traces of the teacher, {students} x {traces} of students"),
        ("engines", f"{config.engines.min_engines} to {config.engines.max_engines}"),
        (
            "training",
            f"{training.method}, {training.epochs} epochs, about {pairs} pairs and {steps} steps "
            f"in all (if {_ASSUMED_RIGHT:.0%} of the teacher's traces are right), "
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
    teacher: _Probe,
    student: _Probe,
) -> float:
    cores = os.cpu_count() or 1
    gpu = config.cluster.accelerator == "gpu"
    decoding = memory.GPU_DECODING if gpu else memory.CPU_CORE_DECODING * cores
    training = memory.GPU_TRAINING if gpu else memory.CPU_CORE_TRAINING * cores
    tokens = traces * config.sampling.max_new_tokens
    sampled = 2 * tokens * (teacher.shape.parameters + students * student.shape.parameters)
    trained = 6 * config.training.epochs * pairs * row_tokens * student.shape.parameters
    workers = config.training.workers if gpu else 1
    engines = config.engines.max_engines if gpu else 1
    return sampled / (decoding * engines) + trained / (training * workers)


def describe_plan(plan: Plan, with_prompts: bool = False) -> Table:
    """The plan as a table for the terminal, with a rendered prompt of each model if asked."""
    table = Table(show_header=False, box=None)
    for name, value in plan.rows + (plan.rendered if with_prompts else []):
        table.add_row(name, Text(value))
    for refusal in plan.refusals:
        table.add_row("[red]refused[/red]", Text(refusal))
    return table
