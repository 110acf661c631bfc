"""Brings models here from the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import BadInputError
from pipeline.packaged import PACKAGED_MODELS

# All of a model but its weights.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")


def fetch(hub_id: str, *weights: str) -> Path:
    """The folder of a hub model's small files, and of the weights that these patterns match.

    Raises BadInputError where it cannot be fetched.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with _told(hub_id):
        patterns = [*SMALL_FILES, *weights]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))


def file_names(hub_id: str) -> list[str]:
    """The files of a hub model. Raises BadInputError where the hub does not tell."""
    import huggingface_hub

    with _told(hub_id):
        return huggingface_hub.list_repo_files(hub_id)


@contextmanager
def _told(hub_id: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise BadInputError(
            f"{hub_id} is no folder here, and it could not be fetched from the hub: {reason}. "
            f"Give the folder of a copy, or one of {', '.join(PACKAGED_MODELS)}, which need no hub"
        ) from None
