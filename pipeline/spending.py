"""What a run may spend at an endpoint: counted in tokens, and set aside before it is spent."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from math import inf

from cluster.errors import RunError

_MILLION = 1e6


class LimitReachedError(RunError):
    """The next request might cost more than is left."""


class Budget:
    """Money for requests that are under way at once; without arguments nothing costs anything."""

    def __init__(
        self, input_price: float = 0.0, output_price: float = 0.0, limit: float = inf
    ) -> None:
        """Prices are per million tokens."""
        self._input_price, self._output_price, self.limit = input_price, output_price, limit
        self.spent = 0.0
        self._set_aside: list[float] = []  # for what is under way
        self._settled = asyncio.Condition()

    def cost(self, prompt_tokens: int, tokens: int) -> float:
        """What a prompt and its answer cost."""
        return (prompt_tokens * self._input_price + tokens * self._output_price) / _MILLION

    def pay(self, prompt_tokens: int, tokens: int) -> None:
        """Count what was spent."""
        self.spent += self.cost(prompt_tokens, tokens)

    @asynccontextmanager
    async def room_for(self, most: float) -> AsyncIterator[Callable[[int, int], None]]:
        """Set aside the most that a request may cost, while it is under way; gives `pay`.

        Waits for others to settle where they leave too little. Raises LimitReachedError where
        nothing is under way and it is too little still.
        """
        async with self._settled:
            await self._settled.wait_for(lambda: self._fits(most) or not self._set_aside)
            if not self._fits(most):
                raise LimitReachedError(f"{self.spent:.4g} of {self.limit:g} is spent")
            self._set_aside.append(most)
        try:
            yield self.pay
        finally:
            async with self._settled:
                self._set_aside.remove(most)
                self._settled.notify_all()

    def _fits(self, most: float) -> bool:
        return self.spent + sum(self._set_aside) + most <= self.limit
