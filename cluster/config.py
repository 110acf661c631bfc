"""Reading a run's configuration: YAML, overrides from the command line, one clear error each."""

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from cluster import sections
from cluster.errors import BadInputError
from cluster.sections import EXECUTION, Section


class RunConfig(Section):
    """Everything that `potstill run` needs to know. Unknown keys are refused."""

    run: sections.Run
    task: sections.Task
    teacher: sections.Teacher
    student: sections.Model
    cluster: sections.Cluster = sections.Cluster()
    sampling: sections.Sampling = sections.Sampling()
    engines: sections.Engines = sections.Engines()
    pairs: sections.Pairs = sections.Pairs()
    training: sections.Training = sections.Training()
    serving: sections.Serving = sections.Serving()
    evaluation: sections.Evaluation = sections.Evaluation()

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        problems = list(_impossible_combinations(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def evaluation_tokens(self) -> int:
        """Token limit of an evaluated answer."""
        return self.evaluation.max_new_tokens or self.sampling.max_new_tokens

    @property
    def cpus_held(self) -> float:
        """Logical CPUs that all engines and training workers hold at once."""
        engines, training = self.engines, self.training
        sampling = engines.max_engines * engines.tensor_parallel * engines.cpus_per_engine
        return sampling + training.workers * training.cpus_per_worker


def _impossible_combinations(config: RunConfig) -> list[str]:
    training, engines, sampling = config.training, config.engines, config.sampling
    gpus = config.serving.gpus_per_model
    per_step = training.micro_batch * training.workers
    rules = [
        (
            training.global_batch % per_step != 0,
            f"training.global_batch={training.global_batch} is not a multiple of micro_batch x "
            f"workers = {per_step}: change one of the three",
        ),
        (
            engines.min_engines > engines.max_engines,
            f"engines.min_engines={engines.min_engines} is more than max_engines="
            f"{engines.max_engines}: lower one or raise the other",
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
            config.evaluation_tokens >= config.serving.max_model_len,
            f"evaluation.max_new_tokens={config.evaluation_tokens} leaves no room for a prompt in "
            f"serving.max_model_len={config.serving.max_model_len}: raise the context or lower the "
            "tokens",
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
        (
            gpus > 1 and not gpus.is_integer(),
            f"serving.gpus_per_model={gpus:g}: a model lies on a share of one GPU or on several "
            "whole ones, so set a share below 1 or a whole number",
        ),
        (
            config.task.largest_operand is not None
            and (config.task.name != "word_problems" or config.task.data is not None),
            "task.largest_operand is for the problems that word_problems makes itself, got "
            f"task.name={config.task.name!r} and task.data={config.task.data!r}: remove it",
        ),
    ]
    return [message for broken, message in rules if broken]


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read `path` and apply overrides such as "training.epochs=2".

    Raises BadInputError for a missing file, broken YAML, unknown keys, wrong types and
    combinations that cannot work.
    """
    raw = _read_yaml(Path(path))
    for override in overrides or []:
        _apply_override(raw, override)
    changed = f" with {' '.join(overrides)}" if overrides else ""
    return parse_config(raw, source=f"{path}{changed}")


def parse_config(raw: Any, source: str) -> RunConfig:
    """Validate a configuration that is already read; `source` names it in errors."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise BadInputError(f"{source}: {_describe(error)}") from None


class _SafeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which of two equal keys drops the first: here they are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises MarkedYAMLError for a key that it has twice."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} is there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInputError(f"no configuration at {path}: give the path of a YAML file")
    try:
        raw = _SafeLoader(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise BadInputError(
            f"{path} holds {type(raw).__name__}, expected sections such as task: and teacher:"
        )
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not parents:
        raise BadInputError(
            f"override {override!r} is not of the form section.key=value, such as training.epochs=2"
        )
    target = raw
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise BadInputError(f"override {override!r}: {parent} is not a section")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInputError(f"override {override!r} has no YAML value: {error}") from None


def _describe(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where} is not an option{_options_near(problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing: set it")
        elif problem["type"] == "union_tag_not_found":
            lines.append(
                f"{where}.{problem['ctx']['discriminator'].strip(chr(39))} is missing: set it"
            )
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        else:
            lines.append(f"{where}={problem['input']!r}: {problem['msg'].lower()}")
    return "; ".join(lines)


def _options_near(location: tuple[int | str, ...]) -> str:
    model: Any = RunConfig
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ""
    return f": options here are {', '.join(model.model_fields)}"


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """The dotted recipe fields and their values: what may not change within a run."""
    return dict(_recipe_fields(config, ""))


def _recipe_fields(section: Section, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found += _recipe_fields(value, f"{prefix}{name}.")
        elif EXECUTION not in field.metadata:
            plain = section.model_dump(mode="json", include={name})[name]
            found.append((f"{prefix}{name}", plain))
    return found
