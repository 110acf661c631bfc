"""The plan of a run: what will run, on what, how much of it, and all that it would refuse."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.config import RunConfig
from cluster.endpoint_key import refuse_open_endpoint
from cluster.errors import BadInputError, OutOfReachError
from cluster.lock import refuse_held
from cluster.publishing import is_published
from cluster.refusals import refuse_labels, refuse_nodes, refuse_taken_port, refuse_too_few_cpus
from cluster.run_folder import check_recipe
from cluster.sections import Model, Nodes
from cluster.session import starts_own_cluster
from cluster.shapes import ModelShape, read_shape
from cluster.storage import location
from pipeline.chat import Chat, check_same_tokenizer
from pipeline.fit import check_caches, check_folders, check_labels, misfits
from pipeline.foreign_plan import plan_foreign
from pipeline.hub import known_shape
from pipeline.models import resolve_model
from pipeline.needs import Known, nodes_of, runs_on_gpu
from pipeline.plan_rows import model_row, verdict, whereabouts, work_rows
from pipeline.probing import Probe, Splits, check_training_length, probe_model
from pipeline.stages import stage_table
from pipeline.tasks import load_prompts
from pipeline.tasks.task import SPLITS
from pipeline.verdicts.choice import check_verdict, has_verdicts
from pipeline.work import ASSUMED_PROMPT, Sizes, known_sizes, local_teachers

_IDS_AT_AN_END = 12

Found = TypeVar("Found")


@dataclass
class Plan:
    """What a run would do. It may start where `refusals` and `unseen` are empty."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    """What is out of reach from here; the plan is made without it."""
    rendered: list[tuple[str, str]] = field(default_factory=list)
    known: Known | None = None
    """What the stages are planned by, where it is enough."""

    def check(self, step: Callable[[], Found]) -> Found | None:
        """Take a step of planning; a mistake that it finds becomes a refusal."""
        try:
            return step()
        except OutOfReachError as error:
            self.leave_out(error)
        except BadInputError as error:
            if str(error) not in self.refusals:
                self.refusals.append(str(error))
        return None

    def leave_out(self, error: OutOfReachError) -> None:
        """Go on without what is out of reach."""
        if str(error) not in self.unseen:
            self.unseen.append(str(error))


def plan_run(config: RunConfig) -> Plan:
    """Look at configuration, data, run folder and model folders; start no model."""
    plan, nodes = Plan(), nodes_of(config)
    plan.rows += whereabouts(config, nodes)
    folder_is_seen = plan.check(lambda: check_recipe(config)) is not None  # the store as well
    for check in _checks_of_places(config, nodes):
        plan.check(check)
    data = plan.check(lambda: _look_at_data(plan, config))
    if data is None:
        return plan
    plan.check(lambda: _check_negatives(config))
    sections = _models(config, folder_is_seen)
    probes, models = _look_at_models(plan, sections, config, data)
    if not isinstance(data, Sizes):
        _check_together(plan, config, data, probes, folder_is_seen)
    if models.keys() == sections.keys():
        sizes = data if isinstance(data, Sizes) else _sizes(data, probes)
        _plan_models(plan, models, probes)
        _plan_work(plan, Known(config, models, sizes, nodes, bool(runs_on_gpu(config, nodes))))
    return plan


def _checks_of_places(config: RunConfig, nodes: tuple[Nodes, ...]) -> list[Callable[[], object]]:
    checks: list[Callable[[], object]] = [
        lambda: refuse_held(location(config.run.folder)),
        lambda: refuse_open_endpoint(config.serving.host),
        lambda: check_folders(config, nodes),
        lambda: check_labels(config, nodes),
    ]
    if starts_own_cluster(config):
        checks += [
            lambda: refuse_taken_port(config.serving.host, config.serving.port),
            lambda: refuse_too_few_cpus(config),
            lambda: refuse_labels(config),
            lambda: refuse_nodes(config),
        ]
    return checks


def _check_negatives(config: RunConfig) -> None:
    if config.pairs.negatives_from == "teacher" and not has_verdicts(config.task):
        raise BadInputError(
            f"pairs.negatives_from=teacher needs wrong answers, and {config.task.name} has no "
            "verdicts: set task.verdict, or negatives_from to student"
        )


def _models(config: RunConfig, folder_is_seen: bool) -> dict[str, Model]:
    """The models that this cluster runs.

    The student is the one that an earlier stage will make it of, of the same shape, until it is
    there.
    """
    student = config.student
    if config.base_student:
        made = folder_is_seen and is_published(location(student.model))
        student = student if made else config.base_student
    return {**local_teachers(config), "student": student}


def _look_at_data(plan: Plan, config: RunConfig) -> Splits | Sizes:
    """The prompts; their numbers alone where they are out of reach and their numbers known."""
    try:
        splits = {split: load_prompts(config.task, split, config.run.seed) for split in SPLITS}
    except OutOfReachError as error:
        sizes = known_sizes(config.task)
        if sizes is None:
            raise BadInputError(str(error)) from None
        plan.leave_out(error)
        return sizes
    counts = ", ".join(f"{len(prompts)} {split}" for split, prompts in splits.items())
    plan.rows += [("task", f"{config.task.name}: {counts} prompts"), ("verdict", verdict(config))]
    prompts = [prompt for part in splits.values() for prompt in part]
    plan.check(lambda: check_verdict(config.task, prompts))
    return splits


def _look_at_models(
    plan: Plan, sections: Mapping[str, Model], config: RunConfig, data: Splits | Sizes
) -> tuple[dict[str, Probe], dict[str, tuple[Model, ModelShape]]]:
    """Probes of the models that are seen, and the shapes of these and of those that are known."""
    splits = None if isinstance(data, Sizes) else data
    probes, models = {}, {}
    for name, section in sections.items():
        seen = plan.check(partial(_look_at_model, plan, name, section, config, splits))
        if isinstance(seen, Probe):
            probes[name] = seen
            models[name] = section, seen.shape
        elif seen:
            models[name] = section, seen
    return probes, models


def _look_at_model(
    plan: Plan, name: str, section: Model, config: RunConfig, splits: Splits | None
) -> Probe | ModelShape:
    """A model with its prompts; its shape alone where either is out of reach and that known."""
    try:
        if splits:
            return probe_model(name, section, config, splits)
        return read_shape(resolve_model(section.model), section.trust_remote_code)
    except OutOfReachError as error:
        shape = known_shape(section.model)
        if shape is None:
            raise BadInputError(str(error)) from None
        plan.leave_out(error)
        return shape


def _sizes(splits: Splits, probes: Mapping[str, Probe]) -> Sizes:
    counts = {split: len(prompts) for split, prompts in splits.items()}
    student = probes.get("student")
    return Sizes(**counts, prompt=student.longest_prompt if student else ASSUMED_PROMPT)


def _check_together(
    plan: Plan, config: RunConfig, splits: Splits, probes: Mapping[str, Probe], store_is_seen: bool
) -> None:
    """What a student must have in common with its prompts and teachers."""
    student = probes.get("student")
    if student is None:
        return
    plan.check(lambda: check_training_length(config, student))
    if store_is_seen:
        _plan_foreign_teachers(plan, config, splits, student.chat)
    if config.training.kl_weight and (teacher := probes.get("teacher")):
        plan.check(lambda: check_same_tokenizer(teacher.chat, student.chat))


def _plan_foreign_teachers(plan: Plan, config: RunConfig, splits: Splits, chat: Chat) -> None:
    for name, teacher in config.teachers.items():
        if teacher.endpoint:
            plan.rows += plan.check(partial(plan_foreign, name, config, splits, chat)) or []


def _plan_work(plan: Plan, known: Known) -> None:
    plan.known = known
    if runs_on_gpu(known.config, known.nodes) is False:
        plan.check(lambda: check_caches(known))
    plan.refusals += misfits(known)
    plan.rows += work_rows(known)


def _plan_models(
    plan: Plan, models: Mapping[str, tuple[Model, ModelShape]], probes: Mapping[str, Probe]
) -> None:
    for name, (section, shape) in models.items():
        probe = probes.get(name)
        plan.rows.append(model_row(name, section, shape, probe))
        if probe:
            text = probe.chat.tokenizer.decode(probe.prompt_ids)
            plan.rendered += [(f"{name} reads", repr(text)), ("as ids", _ends(probe.prompt_ids))]


def _ends(ids: list[int]) -> str:
    """Ids, in the midst of many a gap: what goes wrong with templates is at the ends."""
    shown = [str(token) for token in ids]
    if len(shown) > 2 * _IDS_AT_AN_END:
        shown[_IDS_AT_AN_END:-_IDS_AT_AN_END] = ["..."]
    return " ".join(shown)


def describe_plan(plan: Plan, with_prompts: bool = False) -> RenderableType:
    """The plan as tables for the terminal, below a rendered prompt of each model if asked."""
    table = Table(show_header=False, box=None)
    unseen = [("not seen", message) for message in plan.unseen]
    for name, value in (plan.rendered if with_prompts else []) + plan.rows + unseen:
        table.add_row(name, Text(value))
    return Group(table, Text(), stage_table(plan.known)) if plan.known else table
