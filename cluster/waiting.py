"""Lines that tell a user that a long wait without countable steps still goes on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.progress import say

_INTERVAL_S = 15.0


@contextmanager
def waiting(what: str, tell: Callable[[str], None] = say) -> Iterator[None]:
    """Tell, every 15 s until the block ends, how long it has gone on: `what ... 30 s`."""
    started, ended = time.monotonic(), threading.Event()

    def tick() -> None:
        while not ended.wait(_INTERVAL_S):
            tell(f"{what} ... {time.monotonic() - started:.0f} s")

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        ended.set()
        ticker.join()
