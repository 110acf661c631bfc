"""Where the negatives of each epoch came from, read from the written pairs: phi as it was."""

from cluster.config import RunConfig
from cluster.publishing import is_published, read_published
from cluster.run_folder import RunFolder
from pipeline.pairs import PairCounts, count_pairs
from pipeline.rows import Pair, from_table


def read_pairs(run: RunFolder, epoch: int) -> list[Pair]:
    """The published pairs of an epoch; none where there are none yet."""
    folder = run.pairs(epoch)
    if not is_published(folder):
        return []
    return from_table(Pair, read_published(folder))


def audit_run(run: RunFolder, config: RunConfig) -> dict[int, PairCounts]:
    """The counts of every epoch that has pairs."""
    epochs = range(1, config.training.epochs + 1)
    found = {epoch: read_pairs(run, epoch) for epoch in epochs}
    return {epoch: count_pairs(pairs, config.pairs) for epoch, pairs in found.items() if pairs}
