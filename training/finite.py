"""Stops a step whose loss or gradients are not finite before it reaches the optimizer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cluster.errors import RunError
from training.batches import MicroBatch


class NotFiniteError(RunError):
    """A gradient that is not finite only as the sum over all workers."""


class FiniteCheck:
    """Remembers, for each micro-batch of a step, whether loss and gradients were finite.

    It looks at gradients as backward makes them, because ZeRO reduces and frees them on the way.
    Nothing waits for the device until `offenders` is asked, once a step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._now: Tensor | None = None
        self._seen: list[tuple[Tensor, MicroBatch]] = []
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._see)

    def _see(self, gradient: Tensor) -> None:
        # 0 * sum is 0 for finite values and NaN otherwise, without a mask of the gradient's size.
        wide = torch.promote_types(gradient.dtype, torch.float32)
        zero = 0 * gradient.detach().sum(dtype=wide)
        self._now = zero if self._now is None else self._now + zero

    def add(self, loss: Tensor, micro: MicroBatch) -> None:
        """Close a micro-batch, after its backward pass."""
        finite = torch.isfinite(loss.detach())
        if self._now is not None:
            finite = finite & torch.isfinite(self._now)
        self._seen.append((finite, micro))
        self._now = None

    def offenders(self) -> list[str]:
        """Prompt ids of the pairs in micro-batches that were not finite; starts the next step."""
        seen, self._seen = self._seen, []
        return [
            pair.prompt_id for finite, micro in seen if not bool(finite) for pair in micro.pairs
        ]
