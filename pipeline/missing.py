"""Sampling as an anti-join: ask the store what is there, and sample only the rest."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from cluster.digests import digest_text
from cluster.errors import RunError
from cluster.progress import say
from pipeline.rows import Sample, Wanted
from pipeline.store import SampleStore

Request = TypeVar("Request", bound=Wanted)


def sample_key(rendered: str, index: int, seed: int) -> tuple[str, int]:
    """The key of a sample, and the seed that it is drawn with.

    `rendered` is the digest of model, manner and prompt. K is not in the key, so that a larger K
    samples only what is missing.
    """
    key = digest_text(rendered, str(index), str(seed))
    return key, int(key[:7], base=16)


def sample_missing(
    name: str,
    model: str,
    requests: Sequence[Request],
    draw: Callable[[list[Request]], list[Sample]],
    store: SampleStore,
    max_error_share: float,
) -> list[Sample]:
    """A sample for each request: those of the store, and new ones for the rest.

    `draw` stores what it samples, and returns the rows that failed. `model` is the digest under
    which samples are stored, `name` is for the user. Raises RunError past `max_error_share`.
    """
    by_key = {request.key: request for request in requests}
    stored = store.keys(model) & by_key.keys()
    missing = [request for key, request in by_key.items() if key not in stored]
    if stored:
        say(f"{name}: {len(stored)} of {len(by_key)} samples reused")
    errors = draw(missing) if missing else []
    check_error_share(name, errors, len(by_key), max_error_share)
    found = store.read(model, set(by_key))
    found |= {row.key: row for row in errors}
    if lost := by_key.keys() - found.keys():
        raise RunError(
            f"{len(lost)} of {len(by_key)} samples of {name} are not in {store.root} after "
            "sampling: is run.store one place for all nodes? Run again to draw them"
        )
    # The key holds what was asked; the id that a prompt goes by may differ between runs.
    return [
        replace(found[request.key], prompt_id=request.prompt_id, sample_index=request.sample_index)
        for request in requests
    ]


def check_error_share(
    name: str, errors: Sequence[Sample], total: int, max_error_share: float
) -> None:
    """Raise RunError where more than `max_error_share` of `total` samples failed."""
    if len(errors) <= max_error_share * total:
        return
    raise RunError(
        f"{name}: {len(errors)} of {total} samples failed, more than "
        f"sampling.max_error_share={max_error_share:g} allows. The first: {errors[0].error}. "
        "What was sampled is kept; run again to try the rest"
    )
