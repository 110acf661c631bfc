"""The papers' arms by name, each as options over a recipe."""

from pathlib import Path
from typing import Any

import yaml

from cluster.errors import BadInputError

_FILE = Path(__file__).with_name("arms.yaml")


def arms() -> dict[str, dict[str, Any]]:
    """Every arm: its name -> dotted option -> value, and under "stages" how many stages it runs."""
    return yaml.safe_load(_FILE.read_text(encoding="utf-8"))


def options_of(arm: str) -> tuple[dict[str, Any], int | None]:
    """The options of an arm, and how many stages of a recipe it runs (None: all).

    Raises BadInputError for a name that is none.
    """
    known = arms()
    if arm not in known:
        raise BadInputError(f"arm {arm!r} is not known: expected one of {', '.join(known)}")
    options = known[arm]
    return options, options.pop("stages", None)
