"""What sections are made of.

A field is part of the *recipe* (it shapes the result, and may not change within a run) unless its
type is marked `Execution` (where and how fast the same result is made).
"""

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

T = TypeVar("T")
EXECUTION = "execution"
Execution = Annotated[T, EXECUTION]

Share = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Dtype = Literal["bfloat16", "float16", "float32"]


def _read_template(value: str) -> str:
    """The text of a Jinja template: a file is read once, and its text goes where the run goes."""
    if "{" in value:
        return value
    if not Path(value).is_file():
        raise ValueError("is neither a Jinja text nor a file that exists")
    return Path(value).read_text(encoding="utf-8")


Template = Annotated[str, AfterValidator(_read_template)]


class Section(BaseModel):
    """A group of options: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
