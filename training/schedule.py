"""The learning rate: one warm-up and one cosine over the steps of all epochs."""

import math


def count_steps(pairs: int, global_batch: int, steps_per_epoch: int | None = None) -> int:
    """Optimizer steps of an epoch: one pass, whose last batch may be partial, or as many as set."""
    return steps_per_epoch or -(-pairs // global_batch)


def learning_rate(
    step: int, total_steps: int, peak: float, warmup_share: float, final_share: float = 0
) -> float:
    """The rate of step 1, 2, ..., `total_steps`.

    It rises linearly to `peak` over the first share of steps, then falls along a cosine that would
    reach `final_share` of the peak one step after the last.
    """
    warmup = math.ceil(warmup_share * total_steps)
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / (total_steps - warmup + 1)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done)))
