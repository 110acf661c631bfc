"""Where the negatives of each epoch came from, read from the written pairs: phi as it was."""

from dataclasses import dataclass

from cluster import storage
from cluster.run_folder import RunFolder
from pipeline.rows import Pair, from_table


@dataclass(frozen=True)
class EpochAudit:
    """Counts of the pairs of one epoch."""

    epoch: int
    pairs: int
    latest: int  # the negative is of the student after the epoch before
    base: int  # of the base student, drawn
    fallback: int  # of the base student, because the latest had none
    none: int  # no negative: only the NLL applies


def audit_epoch(epoch: int, pairs: list[Pair]) -> EpochAudit:
    """Count an epoch's negatives by where they came from; the four counts add up to `pairs`."""
    none = sum(pair.rejected is None for pair in pairs)
    fallback = sum(pair.rejected_fallback for pair in pairs)
    latest = sum(pair.rejected_epoch == epoch - 1 and epoch > 1 for pair in pairs)
    return EpochAudit(
        epoch=epoch,
        pairs=len(pairs),
        latest=latest,
        base=len(pairs) - none - fallback - latest,
        fallback=fallback,
        none=none,
    )


def read_pairs(run: RunFolder, epoch: int) -> list[Pair]:
    """The published pairs of an epoch; none where there are none yet."""
    folder = run.pairs(epoch)
    if not storage.is_published(folder):
        return []
    return from_table(Pair, storage.read_table(folder))


def audit_run(run: RunFolder, epochs: int) -> list[EpochAudit]:
    """The audit of every epoch that has pairs."""
    found = ((epoch, read_pairs(run, epoch)) for epoch in range(1, epochs + 1))
    return [audit_epoch(epoch, pairs) for epoch, pairs in found if pairs]
