"""A run's configuration as a whole: what must go together, and one clear error for what cannot."""

from typing import Any, Self

from pydantic import ValidationError, model_validator

from cluster import sections
from cluster.credentials import misplaced_credentials
from cluster.errors import BadInputError
from cluster.nodes import impossible_nodes
from cluster.sections import EXECUTION, ReadBy, Section
from cluster.teachers import impossible_judge, impossible_teachers, option_of
from cluster.validation import described


class RunConfig(Section):
    """Everything that `potstill run` needs to know. Unknown keys are refused."""

    run: sections.Run
    task: sections.Task
    teacher: sections.Teacher
    student: sections.Model
    base_student: sections.Model | None = None
    """Whose wrong traces are N_0; null takes the student. Set for a later stage of a recipe, whose
    student has learned already: daDPO's negatives are the original student's."""
    further_teachers: tuple[sections.Teacher, ...] = ()
    """Teachers beside the first, which alone is served and evaluated; their traces are pooled."""
    cluster: sections.Cluster = sections.Cluster()
    sampling: sections.Sampling = sections.Sampling()
    engines: sections.Engines = sections.Engines()
    scoring: sections.Scoring = sections.Scoring()
    pairs: sections.Pairs = sections.Pairs()
    training: sections.Training = sections.Training()
    serving: sections.Serving = sections.Serving()
    evaluation: sections.Evaluation = sections.Evaluation()

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        problems = misplaced_credentials(self.model_dump())
        problems += _impossible_combinations(self) + impossible_teachers(self.teachers)
        problems += impossible_nodes(self.cluster.nodes)
        if isinstance(self.task.verdict, sections.JudgeVerdict):
            problems += impossible_judge(self.task.verdict)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def teachers(self) -> dict[str, sections.Teacher]:
        """All teachers in their order, by the names of their traces: teacher, teacher_2, ..."""
        further = {f"teacher_{n}": each for n, each in enumerate(self.further_teachers, start=2)}
        return {"teacher": self.teacher, **further}

    @property
    def trusted_code(self) -> dict[str, str]:
        """The models whose own code may run, by the section that allows it."""
        models: dict[str, sections.Model | None] = {
            **{option_of(name): teacher for name, teacher in self.teachers.items()},
            "student": self.student,
            "base_student": self.base_student,
        }
        return {name: m.model for name, m in models.items() if m and m.trust_remote_code}

    @property
    def evaluation_tokens(self) -> int:
        """Token limit of an evaluated answer."""
        return self.evaluation.max_new_tokens or self.sampling.max_new_tokens

    @property
    def contrasts(self) -> bool:
        """Whether training compares right with wrong traces, and so needs negatives."""
        return self.training.method != "sft"

    @property
    def unread(self) -> list[str]:
        """Options away from their defaults that the method does not read."""
        idle = not self.training.kl_weight and self.training.kl_direction != "reverse"
        return ["training.kl_direction"] * idle + [
            f"{part}.{name}"
            for part, section in (("pairs", self.pairs), ("training", self.training))
            for name, field in type(section).model_fields.items()
            if getattr(section, name) != field.default
            for mark in field.metadata
            if isinstance(mark, ReadBy) and self.training.method not in mark.methods
        ]

    @property
    def scored_by(self) -> tuple[str, ...]:
        """Of "reference" and "teacher", those whose scores of whole responses training needs."""
        training = self.training
        dadpo = training.method == "dadpo"
        reference = training.method == "kto" or (dadpo and training.reference_weight > 0)
        teacher = dadpo and training.teacher_weight > 0
        return ("reference",) * reference + ("teacher",) * teacher

    @property
    def cpus_held(self) -> float:
        """Logical CPUs that all engines and training workers hold at once."""
        engines, training = self.engines, self.training
        sampling = engines.max_engines * engines.tensor_parallel * engines.cpus_per_engine
        return sampling + training.workers * training.cpus_per_worker


Rule = tuple[bool, str]  # whether it is broken, and what to say then


def _impossible_combinations(config: RunConfig) -> list[str]:
    rules = [*_context_rules(config), *_training_rules(config), *_pair_rules(config)]
    return [message for broken, message in rules if broken]


def _context_rules(config: RunConfig) -> list[Rule]:
    engines, sampling, serving = config.engines, config.sampling, config.serving
    by_engines = config.evaluation.through == "engines"
    part, answering = ("engines", engines) if by_engines else ("serving", serving)
    return [
        (
            engines.min_engines > engines.max_engines,
            f"engines.min_engines={engines.min_engines} is more than max_engines="
            f"{engines.max_engines}: lower one or raise the other",
        ),
        (
            engines.cpu_threads not in (None, "auto", "nobind")
            and engines.cpu_threads.count("|") + 1 != engines.tensor_parallel,
            f"engines.cpu_threads={engines.cpu_threads} does not name cores for each of "
            f"engines.tensor_parallel={engines.tensor_parallel} processes: divide them by |, as in "
            "0-3|4-7 for two",
        ),
        (
            sampling.max_new_tokens >= engines.max_model_len,
            f"sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in "
            f"engines.max_model_len={engines.max_model_len}: raise the context or lower the tokens",
        ),
        (
            sampling.temperature == 0 and sampling.samples > 1,
            f"sampling.samples={sampling.samples} greedy samples (sampling.temperature=0) would be "
            "one and the same: set sampling.samples to 1, or sampling.temperature above 0",
        ),
        (
            config.evaluation_tokens >= answering.max_model_len,
            f"evaluation.max_new_tokens={config.evaluation_tokens} leaves no room for a prompt in "
            f"{part}.max_model_len={answering.max_model_len}: raise the context, or lower the "
            "tokens",
        ),
        (
            not by_engines and config.evaluation.concurrency > serving.max_concurrency,
            f"evaluation.concurrency={config.evaluation.concurrency} is more than the endpoint "
            f"takes, serving.max_concurrency={serving.max_concurrency}: lower it, or raise that",
        ),
        (
            serving.gpus_per_model > 1 and not serving.gpus_per_model.is_integer(),
            f"serving.gpus_per_model={serving.gpus_per_model:g}: a model lies on a share of one "
            "GPU or on several whole ones, so set a share below 1 or a whole number",
        ),
    ]


def _training_rules(config: RunConfig) -> list[Rule]:
    training = config.training
    per_step = training.micro_batch * training.workers
    anchors = training.reference_weight + training.teacher_weight
    return [
        (
            training.method == "dadpo" and anchors == 0,
            "training.method=dadpo with reference_weight and teacher_weight both 0 learns nothing: "
            "raise one of them",
        ),
        (
            config.teacher.endpoint is not None
            and ("teacher" in config.scored_by or training.kl_weight > 0),
            "teacher.endpoint gives texts alone, and this method needs its probabilities: "
            "set training.teacher_weight and training.kl_weight to 0, use another method, or run "
            "the teacher on this cluster",
        ),
        (
            training.method == "kto" and training.reference_weight == 0,
            "training.method=kto with reference_weight=0 learns nothing: raise it",
        ),
        (
            training.global_batch % per_step != 0,
            f"training.global_batch={training.global_batch} is not a multiple of micro_batch x "
            f"workers = {per_step}: change one of the three",
        ),
        (
            training.least_workers > training.workers,
            f"training.min_workers={training.min_workers} is more than workers={training.workers}: "
            "lower it, or raise workers",
        ),
        (
            training.offload == "parameters" and training.zero_stage != 3,
            f'training.offload="parameters" needs zero_stage 3, got {training.zero_stage}: set '
            'zero_stage to 3, or offload to "optimizer"',
        ),
        (
            training.offload == "optimizer" and training.zero_stage == 0,
            'training.offload="optimizer" needs zero_stage 1 to 3, got 0: raise zero_stage, or set '
            'offload to "none"',
        ),
    ]


def _pair_rules(config: RunConfig) -> list[Rule]:
    pairs, epochs = config.pairs, config.training.epochs
    phis = pairs.phi_schedule or (pairs.phi,) * epochs
    stale = _not_fresh(config)
    return [
        (
            len(phis) != epochs,
            f"pairs.phi_schedule has {len(phis)} values for training.epochs={epochs}: give one an "
            "epoch",
        ),
        (
            pairs.negatives_from == "teacher" and any(phis[1:]),
            f"pairs.negatives_from=teacher, whose negatives never change, with phi={phis}: set "
            "pairs.phi to 0",
        ),
        (
            pairs.draw == "recent" and epochs > 0 and not any(phis[1:]),
            f"pairs.draw=recent takes negatives of all later students, and phi={phis} takes none: "
            "set pairs.phi above 0 and two epochs or more, or pairs.draw to uniform",
        ),
        (
            pairs.base == "fresh" and stale is not None,
            f"pairs.base=fresh with {stale}: set pairs.base to once, or change that",
        ),
    ]


def _not_fresh(config: RunConfig) -> str | None:
    """What keeps the base student from writing other negatives while the student trains."""
    if config.engines.between_epochs == "release":
        return "engines.between_epochs=release, which leaves no engine beside the training workers"
    if config.sampling.temperature == 0:
        return "sampling.temperature=0, at which it writes the same texts again"
    if config.pairs.negatives_from == "teacher":
        return "pairs.negatives_from=teacher, where it writes none"
    return None


def parse_config(raw: Any, source: str) -> RunConfig:
    """Validate a configuration that is already read; `source` names it in errors."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise BadInputError(f"{source}: {described(error, RunConfig)}") from None


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """The dotted recipe fields and their values: what may not change within a run."""
    return dict(_recipe_fields(config, ""))


def _recipe_fields(section: Section, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if EXECUTION in field.metadata:
            continue
        if isinstance(value, Section):
            found += _recipe_fields(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for place, item in enumerate(value):
                found += _recipe_fields(item, f"{prefix}{name}[{place}].")
        else:
            plain = section.model_dump(mode="json", include={name})[name]
            found.append((f"{prefix}{name}", plain))
    return found
