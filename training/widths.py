"""How many heads and channels a model keeps where a share of all its parameters is to go."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import BadInputError
from training.prunable import Prunable

TOLERANCE = 0.01  # of the ratio: one point
_NARROWEST = 16  # channels of an MLP that are left at the least
# Engines like widths that are multiples; only models of a few channels need the smaller ones.
_MULTIPLES = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Widths:
    """What each layer has, or keeps."""

    groups: int
    channels: int


def removed_share(model: Prunable, kept: Widths) -> float:
    """The share of all parameters that goes where these widths stay."""
    groups, channels = model.groups - kept.groups, model.channels - kept.channels
    removed = groups * model.group_parameters + channels * model.channel_parameters
    return removed / model.parameters


def choose_widths(model: Prunable, ratio: float) -> Widths:
    """The widths that remove `ratio` of all parameters within TOLERANCE, embeddings counted in.

    Heads and channels give the same share of theirs, as in LLM-Pruner (arXiv:2305.11627), as far
    as whole groups allow; where they do not, channels give more, which costs less. The query heads
    that stay divide the hidden size, without which transformers refuses the configuration. Raises
    BadInputError where no widths meet the ratio.
    """
    near = [
        kept
        for multiple in _MULTIPLES
        for kept in _candidates(model, ratio, multiple)
        if abs(removed_share(model, kept) - ratio) <= TOLERANCE
    ]
    if near:
        return min(near, key=lambda kept: _preference(model, kept))
    largest = removed_share(model, Widths(min(_group_counts(model)), _narrowest(model)))
    parts = "heads and MLP channels" if model.prunes_heads else "MLP channels"
    raise BadInputError(
        f"ratio={ratio:g} of all parameters cannot be pruned from {parts}: the largest is "
        f"{largest:.4f}, as embeddings count and stay; give a ratio up to that"
    )


def check_ratio(ratio: float) -> None:
    """Raise BadInputError for what is no share."""
    if not 0 < ratio < 1:
        raise BadInputError(
            f"ratio={ratio:g}: expected a share of all parameters above 0 and below 1, such as 0.2"
        )


def _candidates(model: Prunable, ratio: float, multiple: int) -> Iterator[Widths]:
    """For each number of groups the channels that come nearest to the ratio; never all of both."""
    for groups in _group_counts(model):
        lost = model.groups - groups
        to_go = ratio * model.parameters - lost * model.group_parameters
        wanted = model.channels - to_go / model.channel_parameters
        most = model.channels if lost else model.channels - multiple
        channels = min(multiple * round(wanted / multiple), most)
        yield Widths(groups, max(channels, _narrowest(model)))


def _group_counts(model: Prunable) -> list[int]:
    if not model.prunes_heads:
        return [model.groups]
    return [
        groups
        for groups in range(1, model.groups + 1)
        if model.hidden_size % (groups * model.queries) == 0 or groups == model.groups
    ]


def _narrowest(model: Prunable) -> int:
    return min(_NARROWEST, model.channels)


def _preference(model: Prunable, kept: Widths) -> tuple[bool, int, float]:
    """Lower is better: heads lose no larger a share than channels, a good multiple, even shares."""
    lead = kept.groups / model.groups - kept.channels / model.channels
    rank = next(rank for rank, size in enumerate(_MULTIPLES) if kept.channels % size == 0)
    return lead < 0, rank, abs(lead)
