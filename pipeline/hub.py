"""Brings models here from the Hugging Face hub, and knows the shapes of a few without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from cluster.errors import OutOfReachError
from cluster.shapes import ModelShape
from pipeline.packaged import PACKAGED_MODELS

# All of a model but its weights.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")

_SHAPES = Path(__file__).with_name("hub_shapes.yaml")


def known_shape(hub_id: str) -> ModelShape | None:
    """The shape of a hub model that a shipped recipe names, without the hub."""
    shapes = yaml.safe_load(_SHAPES.read_text(encoding="utf-8"))
    return ModelShape(**shapes[hub_id]) if hub_id in shapes else None


def fetch(hub_id: str, *weights: str) -> Path:
    """The folder of a hub model's small files, and of the weights that these patterns match.

    Raises OutOfReachError where it cannot be fetched.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with _told(hub_id):
        patterns = [*SMALL_FILES, *weights]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))


def file_names(hub_id: str) -> list[str]:
    """The files of a hub model. Raises OutOfReachError where the hub does not tell."""
    import huggingface_hub

    with _told(hub_id):
        return huggingface_hub.list_repo_files(hub_id)


@contextmanager
def _told(hub_id: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OutOfReachError(
            f"{hub_id} is no folder here, and it could not be fetched from the hub: {reason}. "
            f"Give the folder of a copy, or one of {', '.join(PACKAGED_MODELS)}, which need no hub"
        ) from None
