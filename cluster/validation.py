"""What a validation found, in words for the person who wrote the configuration."""

from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

# What PyYAML raises for texts that it cannot read: a day that no month has is a ValueError.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


def described(error: ValidationError, model: type[BaseModel]) -> str:
    """All problems of an input that `model` refused, each with its option's dotted name."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where} is not an option{_options_near(problem['loc'], model)}")
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing: set it")
        elif problem["type"] == "union_tag_not_found":
            lines.append(
                f"{where}.{problem['ctx']['discriminator'].strip(chr(39))} is missing: set it"
            )
        elif problem["type"] == "value_error" and isinstance(problem["input"], str):
            lines.append(f"{where}={problem['input']!r} {problem['ctx']['error']}")
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        else:
            lines.append(f"{where}={problem['input']!r}: {problem['msg'].lower()}")
    return "; ".join(lines)


def _options_near(location: tuple[int | str, ...], model: Any) -> str:
    for part in location[:-1]:
        if isinstance(part, int):  # a place in a list of sections
            continue
        field = model.model_fields.get(part)
        model = _section_in(field.annotation) if field else None
        if model is None:
            return ""
    return f": options here are {', '.join(model.model_fields)}"


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, may be, or lists."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
