"""Reading a recipe: YAML, an arm, overrides from the command line, and the stages that it has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.arms import options_of
from cluster.config import RunConfig, parse_config
from cluster.errors import BadInputError
from cluster.run_folder import RunFolder
from cluster.storage import location
from cluster.validation import NOT_YAML

_STAGES = "stages"


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] | None = None,
    arm: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[RunConfig]:
    """The configurations of a recipe's stages, in the order in which they run; mostly one.

    Overrides are of the form "training.epochs=2". A recipe with `stages` (names, each with the
    sections that it changes) runs them in folders of their own: each trains the student of the one
    before, and draws negatives from the original student. An arm changes the last stage that it
    runs. `options` (dotted, as a table has them) yield to the arm, and the arm to overrides.

    Raises BadInputError for a missing file, broken YAML, unknown keys, wrong types and
    combinations that cannot work.
    """
    raw = _read_yaml(Path(path))
    stages = raw.pop(_STAGES, None)
    _check_stages(stages)
    for key, value in (options or {}).items():
        _set_option(raw, key, value, "the table")
    changes = _apply_arm(arm, raw, stages, _keys(overrides))
    for override in overrides or ():
        _apply_override(raw, stages, override)
    changes += _names(overrides)
    source = " ".join([str(path), *["with"] * bool(changes), *changes])
    return [parse_config(raw, source)] if stages is None else _chain(raw, stages, source)


def _apply_arm(
    arm: str | None, raw: dict[str, Any], stages: dict[str, Any] | None, chosen: set[str]
) -> list[str]:
    """Put an arm's options where it ends, but for those that are `chosen` on the command line."""
    if arm is None:
        return []
    options, count = options_of(arm)
    last, prefix = raw, ""
    if stages is not None:
        for name in list(stages)[count:] if count else ():
            del stages[name]
        name = list(stages)[-1]
        last, prefix = stages[name], f"{_STAGES}.{name}."
    for key, value in options.items():
        if not {key, prefix + key} & chosen:
            _set_option(last, key, value, f"arm {arm!r}")
    return [f"--arm {arm}"]


def _names(overrides: Sequence[str] | None) -> list[str]:
    """Overrides without their values, which may be a key that has no place here."""
    return [override.partition("=")[0] for override in overrides or ()]


def _keys(overrides: Sequence[str] | None) -> set[str]:
    return set(_names(overrides))


def load_config(
    path: str | Path, overrides: Sequence[str] | None = None, arm: str | None = None
) -> RunConfig:
    """The configuration of a recipe of one stage; errors as in `load_recipe`."""
    (config,) = load_recipe(path, overrides, arm)
    return config


def _check_stages(stages: Any) -> None:
    if stages is None:
        return
    if not isinstance(stages, dict) or not stages or not all(map(_is_stage, stages.items())):
        raise BadInputError(
            f"stages={stages!r}: expected names, each with the sections that it changes, such as "
            "dsft: {training: {method: sft}}"
        )


def _is_stage(item: tuple[Any, Any]) -> bool:
    name, changes = item
    return isinstance(name, str) and name.isidentifier() and isinstance(changes, dict)


def _chain(raw: dict[str, Any], stages: dict[str, Any], source: str) -> list[RunConfig]:
    configs: list[RunConfig] = []
    for name, changes in stages.items():
        merged = _merge(raw, changes)
        folder = str(_section(raw, "run").get("folder", "")).rstrip("/")
        merged["run"] = {**_section(merged, "run"), "folder": f"{folder}/{name}"}
        if configs:
            if configs[-1].training.epochs == 0:
                raise BadInputError(
                    f"{source}: the stage before {name} has training.epochs=0, and so no student "
                    "to go on with: raise it, or leave that stage out"
                )
            merged["base_student"] = _section(raw, "student")
            merged["student"] = {**_section(merged, "student"), **student_of(configs[-1])}
        configs.append(parse_config(merged, f"{source}, stage {name}"))
    return configs


def student_of(stage: RunConfig) -> dict[str, Any]:
    """Where a stage's student lies, once it has run: its checkpoints have their chat template."""
    folder = RunFolder(location(stage.run.folder))
    return {"model": str(folder.checkpoint(stage.training.epochs)), "chat_template": None}


def _section(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = raw.get(name)
    return found if isinstance(found, dict) else {}


def _merge(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(raw)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


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
    except BadInputError:
        raise
    except NOT_YAML as error:
        raise BadInputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise BadInputError(
            f"{path} holds {type(raw).__name__}, expected sections such as task: and teacher:"
        )
    return raw


def _apply_override(raw: dict[str, Any], stages: dict[str, Any] | None, override: str) -> None:
    key, equals, text = override.partition("=")
    shown = f"{key}=..." if equals else key  # a value may be a key that has no place here
    if not equals or "." not in key:
        raise BadInputError(
            f"override {shown!r} is not of the form section.key=value, such as training.epochs=2"
        )
    try:
        value = yaml.safe_load(text)
    except NOT_YAML as error:
        raise BadInputError(f"override {shown!r} has no YAML value: {error}") from None
    first, _, rest = key.partition(".")
    if first != _STAGES:
        _set_option(raw, key, value, f"override {shown!r}")
        return
    name, _, rest = rest.partition(".")
    if name not in (stages or {}) or not rest:
        there = f"those of {', '.join(stages)}" if stages else "none"
        raise BadInputError(f"override {shown!r}: {name!r} is no stage, the recipe has {there}")
    assert stages is not None
    _set_option(stages[name], rest, value, f"override {shown!r}")


def _set_option(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
    *parents, last = key.split(".")
    target = raw
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise BadInputError(f"{source}: {parent} is not a section")
    target[last] = value
