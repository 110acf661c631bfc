"""What sections are made of.

A field is part of the *recipe* (it shapes the result, and may not change within a run) unless its
type is marked `Execution` (where and how fast the same result is made).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

T = TypeVar("T")
EXECUTION = "execution"
Execution = Annotated[T, EXECUTION]


@dataclass(frozen=True)
class ReadBy:
    """Marks an option that these methods of training read alone.

    Others leave it be, so that one recipe has what several arms need, and a plan names it.
    """

    methods: tuple[str, ...]


Contrasting = Annotated[T, ReadBy(("orpo", "dadpo", "kto"))]

Share = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
NonEmpty = Annotated[str, Field(min_length=1)]
Dtype = Literal["bfloat16", "float16", "float32"]


def _read_template(value: str) -> str:
    """The text of a Jinja template: a file is read once, and its text goes where the run goes."""
    if "{" in value:
        return value
    if not Path(value).is_file():
        raise ValueError("is neither a Jinja text nor a file that exists")
    return Path(value).read_text(encoding="utf-8")


Template = Annotated[str, AfterValidator(_read_template)]


def _check_place(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("is no name, path or URL: give one, without control characters")
    return value


Place = Annotated[str, AfterValidator(_check_place)]


class Section(BaseModel):
    """A group of options: frozen; unknown keys and numbers that are not finite are refused.

    A default is of its field's type, as what is read is: digests take 1 and 1.0 for two things.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
