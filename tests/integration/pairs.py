"""Actors of the training tests: one writes pairs in the place of the real resampler.

A module of its own, with few imports: a process of Ray's imports it for each actor.
"""

import time

import ray

from cluster.publishing import is_published, publishing
from cluster.run_folder import RunFolder
from cluster.storage import location, write_table
from pipeline.rows import Pair, to_table

PAIRS = 11  # 3 batches of 4, the last one partial


def pair_of(index: int, epoch: int) -> Pair:
    rejected = None if index % 4 == 3 else f"It is {index * 7 + epoch}."
    return Pair(
        prompt_id=f"p{index}",
        prompt=f"Tom has {index} pens and buys 5 more. How many pens?",
        chosen=f"{index} + 5 = {index + 5}. " * (1 + index % 3) + f"\\boxed{{{index + 5}}}",
        rejected=rejected,
        chosen_model="teacher",
        chosen_epoch=0,
        rejected_model=rejected and "student",
        rejected_epoch=0 if rejected else None,
        rejected_fallback=False,
        chosen_finished=True,
        rejected_finished=True if rejected else None,
    )


def publish_pairs(run: RunFolder, epoch: int, count: int = PAIRS) -> None:
    table = to_table(Pair, [pair_of(index, epoch) for index in range(count)])
    with publishing(run.pairs(epoch)) as folder:
        write_table(table, location(str(folder / "pairs.parquet")))


@ray.remote(num_cpus=0)
class WritesPairs:
    """In the place of the real resampler."""

    def __init__(self, run: RunFolder, counts: dict[int, int] | None = None, delay: float = 0):
        self.run, self.counts, self.delay = run, counts or {}, delay

    def prepare_epoch(self, epoch: int) -> dict[str, int]:
        time.sleep(self.delay)
        assert is_published(self.run.checkpoint(epoch - 1)), "asked before its checkpoint"
        publish_pairs(self.run, epoch, self.counts.get(epoch, PAIRS))
        return {}


@ray.remote(num_cpus=4)
class Holds:
    """Another's work, which holds four of the eight CPUs from when there is room for it."""
